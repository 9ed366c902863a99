//! Which lane of a warp holds which element of `mma.m16n8k16` (PTX ISA, "Matrix fragments for mma.m16n8k16
//! with floating point type"), and how softmax weights become an A fragment without leaving their lane.

use super::Half;

/// Row and column (k) of element `i` (0 to 7, two to a register) of A `[16, 16]`.
#[inline(always)]
pub const fn a_at(lane: usize, i: usize) -> (usize, usize) {
    let (g, t) = (lane / 4, lane % 4);
    (g + 8 * (i / 2 % 2), 2 * t + i % 2 + 8 * (i / 4))
}

/// Row (k) and column of element `i` (0 to 3) of B `[16, 8]`.
#[inline(always)]
pub const fn b_at(lane: usize, i: usize) -> (usize, usize) {
    let (g, t) = (lane / 4, lane % 4);
    (2 * t + i % 2 + 8 * (i / 2), g)
}

/// Row and column of element `i` (0 to 3) of C `[16, 8]`.
#[inline(always)]
pub const fn c_at(lane: usize, i: usize) -> (usize, usize) {
    let (g, t) = (lane / 4, lane % 4);
    (g + 8 * (i / 2), 2 * t + i % 2)
}

/// Two neighbouring C fragments `[16, 8]` as one A fragment `[16, 16]`: the lane maps agree.
#[inline(always)]
pub fn c_to_a<T: Half>(left: [f32; 4], right: [f32; 4]) -> [u32; 4] {
    [
        T::pack(left[0], left[1]),
        T::pack(left[2], left[3]),
        T::pack(right[0], right[1]),
        T::pack(right[2], right[3]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bijection<const ROWS: usize, const COLUMNS: usize>(
        per_lane: usize,
        at: fn(usize, usize) -> (usize, usize),
    ) {
        let mut seen = [[false; COLUMNS]; ROWS];
        for lane in 0..32 {
            for i in 0..per_lane {
                let (row, column) = at(lane, i);
                assert!(!core::mem::replace(&mut seen[row][column], true), "{row} {column} twice");
            }
        }
        assert!(seen.as_flattened().iter().all(|&s| s));
    }

    #[test]
    fn fragments_hold_every_element_once() {
        bijection::<16, 16>(8, a_at);
        bijection::<16, 8>(4, b_at);
        bijection::<16, 8>(4, c_at);
    }

    #[test]
    fn two_c_fragments_are_an_a_fragment() {
        for lane in 0..32 {
            for i in 0..8 {
                // Registers of `c_to_a`: left 0 1, left 2 3, right 0 1, right 2 3.
                let (row, column) = c_at(lane, i % 4);
                assert_eq!(a_at(lane, i), (row, column + 8 * (i / 4)));
            }
        }
    }
}
