//! One instruction a launch, on words that the test chooses: the simulator's models and the GPU must agree.

use crate::abi::{ConformanceParams, conformance as op};
use crate::isa;

/// One warp.
pub(super) struct Config;

impl super::Config for Config {
    const THREADS: u32 = 32;
    const MIN_CTAS: u32 = 1;
    const SHARED_BYTES: u32 = 4096;
}

#[inline(always)]
pub(super) unsafe fn body(p: &ConformanceParams) {
    let lane = isa::thread_x();
    let (input, output) = (p.input + 64 * lane as u64, p.output + 64 * lane as u64);
    // SAFETY: the test gives 16 words a lane.
    let word = |i: u32| unsafe { isa::ld_global_1(input + 4 * i as u64) }[0];
    let float = |i: u32| f32::from_bits(word(i));
    // SAFETY: as above.
    let put = |i: u32, x: u32| unsafe { isa::st_global_1(output + 4 * i as u64, [x]) };
    let base = isa::shared_base();
    match p.op {
        op::SHUFFLES => {
            put(0, isa::shfl_bfly(word(0), word(1)));
            put(1, isa::shfl_idx(word(0), word(2)));
            put(2, isa::shfl_up(word(0), word(3)));
            put(3, isa::ballot(word(0) & 1 == 1));
        }
        op::MMA_F16 | op::MMA_BF16 => {
            let (a, b) = ([0, 1, 2, 3].map(word), [4, 5].map(word));
            let mut d = [6, 7, 8, 9].map(float);
            if p.op == op::MMA_F16 {
                isa::mma_f16(&mut d, a, b)
            } else {
                isa::mma_bf16(&mut d, a, b)
            }
            (0..4).for_each(|i| put(i, d[i as usize].to_bits()));
        }
        op::LDMATRIX => {
            // SAFETY: 16 bytes a lane, written before the barrier.
            unsafe {
                isa::st_shared_4(base + 16 * lane, [0, 1, 2, 3].map(word));
                isa::bar_sync();
                let row = base + 16 * (word(4) % 32);
                let (plain, transposed) = (isa::ldmatrix_x4(row), isa::ldmatrix_x4_trans(row));
                (0..4).for_each(|i| put(i, plain[i as usize]));
                (0..4).for_each(|i| put(4 + i, transposed[i as usize]));
            }
        }
        op::CONVERT => {
            put(0, isa::pack_f16x2(float(0), float(1)));
            put(1, isa::pack_bf16x2(float(0), float(1)));
            let (low, high) = isa::f16x2_to_f32(word(2));
            put(2, low.to_bits());
            put(3, high.to_bits());
            let (low, high) = isa::bf16x2_to_f32(word(2));
            put(4, low.to_bits());
            put(5, high.to_bits());
            put(6, isa::fma_f16x2(word(3), word(4), word(5)));
            put(7, isa::sub_f16x2(word(3), word(4)));
        }
        op::ARITHMETIC => {
            put(0, isa::fma(float(0), float(1), float(2)).to_bits());
            put(1, isa::max_nan(float(0), float(1)).to_bits());
            let (quotient, rest) = isa::div_rem(word(3), word(4));
            put(2, quotient);
            put(3, rest);
            let wide = |low: u32, high: u32| word(low) as u64 | (word(high) as u64) << 32;
            let (quotient, rest) = isa::div_rem_u64(wide(3, 4), wide(5, 6));
            put(4, quotient as u32);
            put(5, (quotient >> 32) as u32);
            put(6, rest as u32);
            put(7, (rest >> 32) as u32);
        }
        op::APPROXIMATE => {
            put(0, isa::ex2(float(0)).to_bits());
            put(1, isa::lg2(float(1)).to_bits());
            put(2, isa::rcp(float(1)).to_bits());
            put(3, isa::rsqrt(float(1)).to_bits());
        }
        op::COPIES => {
            // SAFETY: 32 bytes of shared memory a lane, its own until the barrier.
            unsafe {
                let mine = base + 32 * lane;
                isa::cp_async_16(mine, input, 16);
                isa::cp_async_commit();
                isa::cp_async_4(mine + 16, input + 16, 4);
                isa::cp_async_4(mine + 20, input, 0);
                isa::cp_async_commit();
                isa::cp_async_wait::<1>();
                let first = isa::ld_shared_4(mine);
                (0..4).for_each(|i| put(i, first[i as usize]));
                isa::cp_async_wait::<0>();
                isa::bar_sync();
                // The next lane's.
                let next = base + 32 * ((lane + 1) % 32);
                let [a, b] = isa::ld_shared_2(next + 16);
                put(4, a);
                put(5, b);
            }
        }
        _ => {
            // SAFETY: the lane's own words, and three that all add to after a barrier.
            unsafe {
                if lane == 0 {
                    isa::st_shared_4(base, [0; 4]);
                }
                isa::bar_sync();
                isa::atom_add_shared(base, word(0));
                isa::atom_add_shared_u64(base + 8, word(1) as u64 | (word(2) as u64) << 32);
                isa::atom_add_global(p.sum, word(0));
                isa::bar_sync();
                let [sum, _, low, high] = isa::ld_shared_4(base);
                put(0, sum);
                put(1, low);
                put(2, high);
                isa::st_global_u16(output + 12, word(3));
                isa::st_global_u16(output + 14, word(3) >> 16);
                put(4, isa::ld_global_u16(input + 14));
                isa::st_global_2(output + 24, isa::ld_global_2(input + 8));
                isa::st_global_4(output + 32, isa::ld_global_4(input + 16));
                let mine = base + 64 + 16 * lane;
                isa::st_shared_1(mine, [word(8)]);
                isa::st_shared_2(mine + 8, [word(9), word(10)]);
                isa::warp_sync();
                let next = base + 64 + 16 * ((lane + 1) % 32);
                put(12, isa::ld_shared_1(next)[0]);
                put(13, isa::ld_shared_1(next + 12)[0]);
                put(14, isa::grid_x() << 16 | isa::block_x() << 8 | isa::block_y());
            }
        }
    }
}
