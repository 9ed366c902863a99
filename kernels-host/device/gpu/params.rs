//! From checked views to what kernels are given.

use ferroflash_kernels::abi::{PageRows, Rows, TokenRows, element as code};

use crate::error::{Error, Result};
use crate::tensor::{DType, View};

/// Pages that a kernel does not look at.
pub(super) const NO_PAGES: PageRows = PageRows { base: 0, page: 0, head: 0, token: 0 };

/// Rows `[token, head, channel]`, or `[token, head]`; no rows for `None`.
pub(super) fn token_rows(view: Option<&View<'_>>) -> TokenRows {
    let Some(view) = view else { return TokenRows { base: 0, token: 0, head: 0 } };
    let (s, size) = (view.strides(), view.dtype().size() as u64);
    TokenRows { base: view.ptr() as u64, token: s[0] as u64 * size, head: s[1] as u64 * size }
}

/// A float type's code.
pub(super) fn element(dtype: DType) -> u32 {
    match dtype {
        DType::F16 => code::F16,
        DType::BF16 => code::BF16,
        _ => code::F32,
    }
}

/// All dimensions but the last, of one to three.
pub(super) fn rows(view: &View<'_>) -> Rows {
    let (s, shape, size) = (view.strides(), view.shape(), view.dtype().size() as u64);
    let (inner, num_inner) = if shape.len() == 3 { (s[1] as u64 * size, shape[1] as u32) } else { (0, 1) };
    let outer = if shape.len() > 1 { s[0] as u64 * size } else { 0 };
    Rows { base: view.ptr() as u64, outer, inner, dtype: element(view.dtype()), num_inner }
}

/// Rows `[page, head, token, channel]`.
pub(super) fn page_rows(view: &View<'_>) -> PageRows {
    let (s, size) = (view.strides(), view.dtype().size() as u64);
    PageRows {
        base: view.ptr() as u64,
        page: s[0] as u64 * size,
        head: s[1] as u64 * size,
        token: s[2] as u64 * size,
    }
}

/// Ragged rows `[token, head, channel]` as one page.
pub(super) fn ragged_rows(view: &View<'_>) -> PageRows {
    let TokenRows { base, token, head } = token_rows(Some(view));
    PageRows { base, page: 0, head, token }
}

/// f16 or bf16, the same for all.
pub(super) fn same_half(op: &'static str, views: &[(&'static str, &View<'_>)]) -> Result<DType> {
    let first = views[0].1.dtype();
    for (what, view) in views {
        if !matches!(view.dtype(), DType::F16 | DType::BF16) {
            return Err(Error::dtype(op, what, "f16 or bf16 on a GPU", view.dtype()));
        }
        if view.dtype() != first {
            let expected = format!("{first}, as {} (GPU kernels take one type)", views[0].0);
            return Err(Error::dtype(op, what, expected, view.dtype()));
        }
    }
    Ok(first)
}

/// Rows that are read and written `bytes` at a time.
pub(super) fn aligned(op: &'static str, what: &'static str, view: &View<'_>, bytes: usize) -> Result<()> {
    let size = view.dtype().size();
    // What rows are found by: of pages, the first three dimensions.
    let strides = &view.strides()[..(view.shape().len() - 1).min(3)];
    // A dimension of one entry is never stepped along.
    let stepped = || strides.iter().zip(view.shape()).filter(|(_, d)| **d > 1).map(|(s, _)| s * size);
    if (view.ptr() as usize).is_multiple_of(bytes) && stepped().all(|s| s.is_multiple_of(bytes)) {
        return Ok(());
    }
    let expected = format!("rows that begin at multiples of {bytes} bytes, on a GPU");
    let got = format!("address {:#x}, strides {:?} of {size} bytes", view.ptr() as usize, view.strides());
    Err(Error::Shape { op, what, expected, got })
}
