//! Host memory for tensors: zeroed, aligned to a cache line.

use memmap2::MmapMut;

/// From here on memory comes straight from the system.
const LARGE: usize = 1 << 21;

/// A cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line([u8; 64]);

// SAFETY: plain bytes, no padding, any bit pattern is valid.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for Line {}

/// Zeroed memory.
pub(crate) enum Memory {
    Small(Vec<Line>, usize),
    /// Mapped: a large cache takes memory only as it is used, and in huge pages where the system has
    /// them, since reading scattered KV pages otherwise waits for address translation.
    Large(MmapMut),
}

impl Memory {
    /// `None` where there is not enough.
    pub(crate) fn zeroed(bytes: usize) -> Option<Self> {
        if bytes < LARGE {
            let lines = bytemuck::try_zeroed_vec(bytes.div_ceil(size_of::<Line>())).ok()?;
            return Some(Memory::Small(lines, bytes));
        }
        let map = MmapMut::map_anon(bytes).ok()?;
        #[cfg(target_os = "linux")]
        // Advice: where it is refused, small pages serve too.
        let _ = map.advise(memmap2::Advice::HugePage);
        Some(Memory::Large(map))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Memory::Small(lines, bytes) => &bytemuck::cast_slice(lines)[..*bytes],
            Memory::Large(map) => map,
        }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Memory::Small(lines, bytes) => &mut bytemuck::cast_slice_mut(lines)[..*bytes],
            Memory::Large(map) => map,
        }
    }
}
