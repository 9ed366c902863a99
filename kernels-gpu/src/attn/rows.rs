//! Packed query rows: row `r` of an item is query token `r / group`, query head `kv_head * group + r % group`.

use core::f32::consts::LOG2_E;

use crate::abi::{AttentionParams, Divisor, KV_BLOCK, Sequence, TokenRows, WorkItem};
use crate::attn::kv::PageList;
use crate::isa;
use crate::tile::Half;

/// Reads a plain struct, as far as it is used.
///
/// # Safety
/// `at` holds a written `T`, a multiple of 8 bytes long, 8-byte aligned, whose bit patterns are all valid; nobody writes
/// it before the launch ends.
#[inline(always)]
#[track_caller]
pub(crate) unsafe fn read_struct<T: Copy>(at: u64) -> T {
    const { assert!(size_of::<T>().is_multiple_of(8) && size_of::<T>() <= 64) };
    // Opaque: of a struct in a list the address of the list's first such word is not kept for each of its words.
    let at = isa::opaque_address(at);
    let mut words = [0u32; 16];
    for i in 0..size_of::<T>() / 8 {
        // SAFETY: the caller's promise.
        [words[2 * i], words[2 * i + 1]] = unsafe { isa::ld_constant_2(at + 8 * i as u64) };
    }
    // SAFETY: the words hold a `T`, by the caller's promise.
    unsafe { core::mem::transmute_copy(&words) }
}

/// Token and head of a packed row.
#[inline(always)]
pub(crate) fn token_head(group: Divisor, kv_head: u32, row: u32) -> (u32, u32) {
    let (token, within) = group.div_rem(row);
    (token, kv_head * group.value + within)
}

impl TokenRows {
    /// Address of a row.
    #[inline(always)]
    pub(crate) fn at(&self, token: u64, head: u32) -> u64 {
        self.base + token * self.token + head as u64 * self.head
    }
}

/// An item and its sequence.
#[inline(always)]
#[track_caller]
pub(crate) fn load_item(p: &AttentionParams, index: u32) -> (WorkItem, Sequence) {
    // SAFETY: the host gives as many items as the launch works on, and their sequences.
    unsafe {
        let item: WorkItem = read_struct(p.items + index as u64 * size_of::<WorkItem>() as u64);
        (item, read_struct(p.sequences + item.seq as u64 * size_of::<Sequence>() as u64))
    }
}

/// Index that no item has.
const NO_ITEM: u32 = u32::MAX;

/// First column of the item under its end or a tree mask.
#[inline(always)]
pub(crate) fn plain_end(item: &WorkItem, seq: &Sequence) -> u32 {
    let tree = seq.kv_len - seq.n_tree;
    if item.kv_end < tree { item.kv_end } else { tree }
}

/// What masks need of an item in every block. It stands in shared memory: registers are what limits the tile. What
/// only edges and ends need is loaded again there.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) p: &'a AttentionParams,
    /// Shared address of: first row, position of query token 0, first column under an end or a tree mask, the item's
    /// index.
    at: u32,
}

impl<'a> Place<'a> {
    /// Shared bytes.
    pub(crate) const BYTES: u32 = 16;

    /// A place that has been written, and can be read after a barrier.
    #[inline(always)]
    pub(crate) fn new(p: &'a AttentionParams, at: u32) -> Self {
        Place { p, at }
    }

    /// Writes the place of item `index`, by one lane.
    ///
    /// # Safety
    /// `at` is 16 aligned bytes of shared memory that nothing else uses.
    #[inline(always)]
    #[track_caller]
    pub(crate) unsafe fn write(&self, index: u32, item: &WorkItem, seq: &Sequence) {
        let position = seq.position as u32;
        // SAFETY: the caller's promise.
        unsafe { isa::st_shared_4(self.at, [item.row_start, position, plain_end(item, seq), index]) };
    }

    /// Writes the place of no item.
    ///
    /// # Safety
    /// As [`Place::write`].
    #[inline(always)]
    #[track_caller]
    pub(crate) unsafe fn write_none(&self) {
        // SAFETY: the caller's promise.
        unsafe { isa::st_shared_4(self.at, [0, 0, 0, NO_ITEM]) };
    }

    /// Number of the item.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn index(&self) -> u32 {
        // SAFETY: written before a barrier.
        unsafe {
            let [index] = isa::ld_shared_1(self.at + 12);
            index
        }
    }

    /// Whether the place is that of no item.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn is_none(&self) -> bool {
        self.index() == NO_ITEM
    }

    /// The item and its sequence.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn item(&self) -> (WorkItem, Sequence) {
        load_item(self.p, self.index())
    }

    /// The lane's two of the 16 rows from row `first` of the tile.
    #[inline(always)]
    pub(crate) fn rows(&self, first: u32) -> LaneRows<'a> {
        LaneRows { place: *self, first }
    }
}

/// A lane's two rows of 16: `lane / 4` and eight further.
#[derive(Clone, Copy)]
pub(crate) struct LaneRows<'a> {
    pub(crate) place: Place<'a>,
    first: u32,
}

impl LaneRows<'_> {
    /// Row `r` (0 or 1) of the tile; its packed row, at or past the item's end, may not be there.
    #[inline(always)]
    pub(crate) fn row(&self, r: usize) -> u32 {
        isa::opaque(self.first) + isa::opaque(isa::thread_x()) % 32 / 4 + 8 * r as u32
    }

    /// Positions of both rows among the sequence's KV tokens, and the first column under an end or tree mask.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn positions(&self) -> ([i32; 2], u32) {
        // SAFETY: published before a barrier.
        let [first, position, plain_end, _] = unsafe { isa::ld_shared_4(self.place.at) };
        let position = |r| position.wrapping_add(self.place.p.group.div_rem(first + self.row(r)).0) as i32;
        ([position(0), position(1)], plain_end)
    }

    /// Whether both rows see all of columns `at..at + 64`; `LISTS` as for [`mask::hide`](crate::attn::mask::hide).
    #[inline(always)]
    #[track_caller]
    pub(crate) fn see_all<const LISTS: bool>(&self, at: u32) -> bool {
        let p = self.place.p;
        let ([first, last], plain_end) = self.positions();
        if at + KV_BLOCK as u32 > plain_end {
            return false;
        }
        let (mut low, mut high) = (at, at + KV_BLOCK as u32 - 1);
        if LISTS && p.logical_pages != 0 {
            let list = PageList::new(p.logical_pages, p.page_size, &self.place.item().0);
            // SAFETY: the columns are below the item's end.
            (low, high) = unsafe { (list.position(low), list.position(high)) };
        }
        (p.score.causal == 0 || high as i32 <= first)
            && (p.score.window == 0 || last as i64 - (low as i64) < p.score.window as i64)
    }

    /// ALiBi slope of row `r`, base 2.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn slope(&self, r: usize) -> f32 {
        let p = self.place.p;
        let (item, _) = self.place.item();
        let head = token_head(p.group, item.kv_head, item.row_start + self.row(r)).1;
        // SAFETY: the host gives one slope per query head.
        let [slope] = unsafe { isa::ld_global_1(p.alibi_slopes + 4 * head as u64) };
        f32::from_bits(slope) * LOG2_E
    }
}

/// Brings the item's query rows to shared memory, a row's chunk of 8 channels to where `place` says: at once or, with
/// `ASYNC` and where they are not to be converted, by copies of the group that is committed next; zeros for rows up to
/// `tile_rows` and channels that are not there.
#[inline(always)]
pub(crate) fn copy_q<Io: Half, T: Half, const CHUNKS: u32, const ASYNC: bool>(
    p: &AttentionParams,
    seq: &Sequence,
    item: &WorkItem,
    place: impl Fn(u32, u32) -> u32,
    tile_rows: u32,
    threads: u32,
) {
    // Opaque, where the kernel comes here again: what follows from it is not computed ahead of its loops.
    let mut index = if ASYNC { isa::thread_x() } else { isa::opaque(isa::thread_x()) };
    while index < tile_rows * CHUNKS {
        let (row, chunk) = (index / CHUNKS, index % CHUNKS);
        let packed = item.row_start + row;
        let there = packed < item.row_end && chunk * 8 < p.head_dim;
        let mut from = p.q.base;
        if there {
            let (token, head) = token_head(p.group, item.kv_head, packed);
            from = p.q.at(seq.q_start + token as u64, head) + chunk as u64 * 16;
        }
        // SAFETY: rows below the item's end are inside Q, as the host has checked; the tile is its own.
        unsafe {
            if ASYNC && Io::IS_BF16 == T::IS_BF16 {
                isa::cp_async_16(place(row, chunk), from, if there { 16 } else { 0 });
            } else {
                let words = if there { isa::ld_global_4(from) } else { [0; 4] };
                let words = if Io::IS_BF16 == T::IS_BF16 { words } else { words.map(convert::<Io, T>) };
                isa::st_shared_4(place(row, chunk), words);
            }
        }
        index += threads;
    }
}

/// Two values in another 16-bit type; f16 takes bf16's up to its own largest.
#[inline(always)]
fn convert<Io: Half, T: Half>(x: u32) -> u32 {
    let clamp = |x: f32| {
        let x = if x > 65504.0 { 65504.0 } else { x };
        if x < -65504.0 { -65504.0 } else { x }
    };
    let (low, high) = Io::unpack(x);
    if T::IS_BF16 { T::pack(low, high) } else { T::pack(clamp(low), clamp(high)) }
}
