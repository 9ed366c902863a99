//! Warp-wide instructions: the rendezvous, bank conflicts, and the models of the tensor-core path.

use std::panic::Location;
use std::string::String;

use super::cluster::Cluster;
use super::shared::Actor;

/// What a warp's lanes bring and take.
#[derive(Default)]
pub(super) struct Warp {
    pub(super) arrived: u32,
    pub(super) at: Option<(&'static str, &'static Location<'static>)>,
    pub(super) args: [[u32; 10]; 32],
    pub(super) out: [[u32; 4]; 32],
}

/// A warp's arguments and results while a model runs.
pub(crate) struct Exchange<'a> {
    cluster: &'a mut Cluster<'static>,
    warp: usize,
    line: &'static Location<'static>,
    pub(crate) args: [[u32; 10]; 32],
    pub(crate) out: [[u32; 4]; 32],
}

impl<'a> Exchange<'a> {
    pub(super) fn take(
        cluster: &'a mut Cluster<'static>,
        warp: usize,
        line: &'static Location<'static>,
    ) -> Self {
        let args = cluster.warps[warp].args;
        Exchange { cluster, warp, line, args, out: [[0; 4]; 32] }
    }

    pub(super) fn give(self) {
        self.cluster.warps[self.warp].out = self.out;
    }

    pub(crate) fn each(&mut self, f: impl Fn(&Self, usize) -> [u32; 4]) {
        for i in 0..32 {
            self.out[i] = f(self, i);
        }
    }

    /// What the warp's lanes did came before what any of them does from now on.
    pub(crate) fn meet(&mut self) {
        let lanes: [usize; 32] = core::array::from_fn(|i| self.warp * 32 + i);
        self.cluster.meet(&lanes);
    }

    /// The lane that `elect` chooses.
    pub(crate) fn elected(&self) -> usize {
        self.cluster.elected
    }

    /// Runs `f` on the shared memory that lane `lane`'s address is in.
    fn shared<T>(
        &mut self,
        lane: usize,
        at: u32,
        f: impl FnOnce(&mut super::shared::Shared, u32, &Actor<'_>) -> Result<T, String>,
    ) -> T {
        let thread = self.warp * 32 + lane;
        let (rank, at) = self.cluster.window(thread, at);
        let stamp = self.cluster.stamp(thread);
        let who = Actor { stamp, clock: &self.cluster.lanes[thread].clock, lane: Some(thread as u16) };
        let result = f(&mut self.cluster.ctas[rank].shared, at, &who);
        self.cluster.check(thread, self.line, result)
    }
}

/// f16 as f32.
#[inline(always)]
pub(crate) fn f16_value(x: u16) -> f32 {
    let sign = (x as u32 & 0x8000) << 16;
    let magnitude = (x as u32 & 0x7fff) << 13;
    let scaled = f32::from_bits(magnitude) * f32::from_bits(0x7780_0000); // 2^112: the exponents' offset
    let bits = if x & 0x7c00 == 0x7c00 { magnitude | 0x7f80_0000 } else { scaled.to_bits() };
    f32::from_bits(sign | bits)
}

/// bf16 as f32.
#[inline(always)]
pub(crate) fn bf16_value(x: u16) -> f32 {
    f32::from_bits((x as u32) << 16)
}

/// `D = A B + C` with exact products, summed in f64 and rounded once; a GPU rounds between, within one
/// f32 ulp of the largest term (it has no specified order).
#[inline(always)]
pub(crate) fn mma_m16n8k16(w: &mut Exchange<'_>, value: impl Fn(u16) -> f32) {
    use crate::tile::fragment::{a_at, b_at, c_at};
    let (mut a, mut b, mut c) = ([[0f32; 16]; 16], [[0f32; 8]; 16], [[0f64; 8]; 16]);
    for (lane, args) in w.args.iter().enumerate() {
        let half = |x: u32, h: usize| value((x >> (16 * h)) as u16);
        for i in 0..8 {
            let (row, k) = a_at(lane, i);
            a[row][k] = half(args[i / 2], i % 2);
        }
        for i in 0..4 {
            let (k, column) = b_at(lane, i);
            b[k][column] = half(args[4 + i / 2], i % 2);
            let (row, column) = c_at(lane, i);
            c[row][column] = f32::from_bits(args[6 + i]) as f64;
        }
    }
    for (c, a) in c.iter_mut().zip(&a) {
        for (&a, b) in a.iter().zip(&b) {
            for (c, &b) in c.iter_mut().zip(b) {
                *c += a as f64 * b as f64;
            }
        }
    }
    for (lane, out) in w.out.iter_mut().enumerate() {
        for (i, out) in out.iter_mut().enumerate() {
            let (row, column) = c_at(lane, i);
            *out = (c[row][column] as f32).to_bits();
        }
    }
}

/// Four 8x8 matrices, rows named by lanes.
pub(crate) fn ldmatrix_x4(w: &mut Exchange<'_>, transposed: bool) {
    let mut banks = [0u32; 4];
    for matrix in 0..4 {
        let mut rows = [[0u32; 4]; 8];
        let mut used = [0u32; 8];
        for (r, row) in rows.iter_mut().enumerate() {
            let lane = 8 * matrix + r;
            let at = w.args[lane][0];
            *row = w.shared(lane, at, |shared, at, who| shared.read(at, who));
            used[(at / 16) as usize % 8] += 1;
        }
        banks[matrix] = used.into_iter().max().unwrap_or(1);
        for lane in 0..32 {
            let element = |row: usize, column: usize| rows[row][column / 2] >> (16 * (column % 2)) & 0xffff;
            let (i, j) = (lane / 4, 2 * (lane % 4));
            w.out[lane][matrix] = if transposed {
                element(j, i) | element(j + 1, i) << 16
            } else {
                element(i, j) | element(i, j + 1) << 16
            };
        }
    }
    w.cluster.stats.shared_accesses += 1;
    w.cluster.stats.shared_cycles += banks.iter().map(|&b| b as u64).sum::<u64>();
    w.cluster.stats.shared_cycles_ideal += 4;
}

/// [`ldmatrix_x4`] the other way.
pub(crate) fn stmatrix_x4(w: &mut Exchange<'_>) {
    let mut banks = 0;
    for matrix in 0..4 {
        let mut used = [0u64; 8];
        for r in 0..8 {
            let (lane, element) = (8 * matrix + r, |c: usize| w.args[4 * r + c / 2][1 + matrix]);
            let row = [0, 2, 4, 6].map(element);
            let at = w.args[lane][0];
            w.shared(lane, at, |shared, at, who| shared.write(at, row, who));
            used[(at / 16) as usize % 8] += 1;
        }
        banks += used.into_iter().max().unwrap_or(1);
    }
    w.cluster.stats.shared_accesses += 1;
    w.cluster.stats.shared_cycles += banks;
    w.cluster.stats.shared_cycles_ideal += 4;
}

impl Cluster<'_> {
    /// Looks at the shared accesses of a warp since its last collective, access by access. Where lanes made
    /// different numbers of them, which belong together is not known, and they are left out.
    pub(super) fn count_conflicts(&mut self, warp: usize) {
        let lanes = &mut self.lanes[warp * 32..warp * 32 + 32];
        let n = lanes[0].log.len();
        if n > 0 && lanes.iter().all(|l| l.log.len() == n) {
            for i in 0..n {
                let bytes = lanes[0].log[i].1;
                // 128 bytes a cycle: accesses of 8 and 16 bytes go by halves and quarters of the warp.
                for part in 0..(bytes / 4) as usize {
                    let size = 128 / bytes as usize;
                    let mut words: [(u32, usize); 32] = [(0, 0); 32];
                    let mut n = 0;
                    for lane in &lanes[part * size..][..size] {
                        for word in lane.log[i].0 / 4..(lane.log[i].0 + bytes) / 4 {
                            if n < 32 {
                                words[n] = (word, (word % 32) as usize);
                                n += 1;
                            }
                        }
                    }
                    words[..n].sort_unstable();
                    let mut used = [0u64; 32];
                    for (j, &(word, bank)) in words[..n].iter().enumerate() {
                        used[bank] += (j == 0 || words[j - 1].0 != word) as u64;
                    }
                    self.stats.shared_cycles += used.into_iter().max().unwrap_or(1);
                    self.stats.shared_cycles_ideal += 1;
                }
                self.stats.shared_accesses += 1;
            }
        }
        lanes.iter_mut().for_each(|l| l.log.clear());
    }
}
