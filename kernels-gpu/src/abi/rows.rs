//! Where rows are.

/// Rows that a CTA takes where a warp takes a row.
pub const ROWS_PER_CTA: usize = 4;

/// Division by a number known to the host, as a multiplication (Granlund and Montgomery, PLDI 1994).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Divisor {
    /// The divisor; 0: none, and the other fields mean nothing.
    pub value: u32,
    multiplier: u32,
    shift: u32,
}

impl Divisor {
    /// For dividends below 2^31 and divisors up to 2^31.
    pub const fn new(value: u32) -> Self {
        if value == 0 {
            return Divisor { value, multiplier: 0, shift: 0 };
        }
        let shift = if value == 1 { 0 } else { 32 - (value - 1).leading_zeros() };
        let multiplier = ((((1u64 << shift) - value as u64) << 32) / value as u64 + 1) as u32;
        Divisor { value, multiplier, shift }
    }

    /// Quotient and remainder.
    #[inline(always)]
    pub const fn div_rem(self, x: u32) -> (u32, u32) {
        let high = ((x as u64 * self.multiplier as u64) >> 32) as u32;
        let quotient = (high + x) >> self.shift;
        (quotient, x - quotient * self.value)
    }
}

/// Rows `[token, head]` of a ragged tensor; strides in bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenRows {
    /// Device address; 0: none.
    pub base: u64,
    /// Bytes from token to token.
    pub token: u64,
    /// Bytes from head to head.
    pub head: u64,
}

/// Rows `[page, head, token]` of a paged tensor; strides in bytes. Ragged KV is one page.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRows {
    /// Device address.
    pub base: u64,
    /// Bytes from page to page.
    pub page: u64,
    /// Bytes from head to head.
    pub head: u64,
    /// Bytes from token to token.
    pub token: u64,
}

/// Element types of [`Rows`].
pub mod element {
    /// 32-bit float.
    pub const F32: u32 = 0;
    /// IEEE half.
    pub const F16: u32 = 1;
    /// bfloat16.
    pub const BF16: u32 = 2;
}

/// Rows `[outer, inner]` of contiguous elements of any float type; strides in bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    /// Device address; 0: none.
    pub base: u64,
    /// Bytes from outer index to outer index.
    pub outer: u64,
    /// Bytes from inner index to inner index.
    pub inner: u64,
    /// An [`element`](super::element).
    pub dtype: u32,
    /// Inner indices.
    pub num_inner: u32,
}

impl Rows {
    /// No rows.
    pub const NONE: Rows = Rows { base: 0, outer: 0, inner: 0, dtype: 0, num_inner: 1 };
}
