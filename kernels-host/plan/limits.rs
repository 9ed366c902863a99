//! Plans that are made anew in place: room for the largest batch, so that addresses and launches stay the same.

use ferroflash_kernels::abi::Sequence;

use super::{Plan, Schedule, Splits};
use crate::error::{Error, Result};
use crate::spec::AttentionSpec;

/// The largest decode batch that a plan has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanLimits {
    /// Sequences.
    pub sequences: usize,
    /// Query tokens of all sequences: rows of the tensors of a run, whatever the batch.
    pub q_tokens: usize,
    /// Tokens per page, of every batch.
    pub page_size: usize,
    /// Entries of all sequences' page tables.
    pub pages: usize,
    /// Words of all tree masks; 0 without trees.
    pub tree_words: usize,
}

/// Lengths of a plan's parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PlanSizes {
    pub(crate) items: usize,
    pub(crate) ranges: usize,
    pub(crate) merges: usize,
    pub(crate) range_merges: usize,
    pub(crate) splits: usize,
    pub(crate) sequences: usize,
    pub(crate) pages: usize,
    pub(crate) logical_pages: usize,
    pub(crate) tree_mask: usize,
    pub(crate) partial_rows: usize,
}

/// Largest limit: four of them in a byte count stay far from overflow.
const MOST: usize = 1 << 28;

impl PlanLimits {
    /// Refuses limits that no memory would hold.
    pub(super) fn check(&self, op: &'static str, sizes: &PlanSizes) -> Result<()> {
        let PlanLimits { sequences, q_tokens, page_size: _, pages, tree_words } = *self;
        let all = [
            ("limits.sequences", sequences),
            ("limits.q_tokens", q_tokens),
            ("limits.pages", pages),
            ("limits.tree_words", tree_words),
        ];
        for (what, limit) in all {
            if limit > MOST {
                return Err(Error::value(op, what, "at most 2^28", limit));
            }
        }
        if sizes.partial_rows > u32::MAX as usize {
            let expected =
                "limits with fewer than 2^32 rows of partial states: a larger split, or fewer pages";
            return Err(Error::value(op, "limits", expected, sizes.partial_rows));
        }
        Ok(())
    }

    /// The most that any batch within the limits needs, where `schedule.ranges` workers walk items.
    pub(super) fn sizes(&self, spec: &AttentionSpec, splits: Splits, schedule: Schedule) -> PlanSizes {
        let mut tiles = self.sequences;
        if schedule.all_walk() {
            tiles =
                tiles.saturating_add(self.q_tokens.saturating_mul(spec.group()) / schedule.row_tile.max(1));
        }
        let tiles = tiles.saturating_mul(spec.num_kv_heads);
        let workers = schedule.ranges.max(1);
        // Workers cut tiles `workers - 1` times at most, each time into two states more at most.
        let mut sizes = PlanSizes {
            items: tiles.saturating_add(workers - 1),
            ranges: workers + 1,
            merges: (workers - 1).min(tiles),
            splits: 2 * (workers - 1),
            sequences: self.sequences,
            pages: self.pages,
            tree_mask: self.tree_words,
            partial_rows: 2 * (workers - 1) * schedule.range_rows,
            ..PlanSizes::default()
        };
        if splits.section() > 0 {
            // A state for each section that a tile touches.
            let tokens = self.pages.saturating_mul(self.page_size);
            let sections = tokens.div_ceil(splits.section()).saturating_add(self.sequences);
            sizes.merges = tiles;
            sizes.splits = sections.saturating_mul(spec.num_kv_heads);
            sizes.partial_rows = sizes.splits.saturating_mul(schedule.range_rows);
        }
        sizes.range_merges = sizes.merges;
        sizes
    }
}

impl Plan {
    /// Lengths of the parts, or the room that is kept for them.
    #[cfg_attr(not(any(feature = "cuda", feature = "sim", test)), allow(dead_code))]
    pub(crate) fn sizes(&self) -> PlanSizes {
        self.reserved.unwrap_or(PlanSizes {
            items: self.items.len(),
            ranges: self.ranges.len(),
            merges: self.merges.len(),
            range_merges: self.range_merges,
            splits: self.splits.len(),
            sequences: self.sequences.len(),
            pages: self.pages.len(),
            logical_pages: self.logical_pages.len(),
            tree_mask: self.tree_mask.len(),
            partial_rows: self.partial_rows,
        })
    }

    /// Gives the plan room up to limits, and as many workers as any other plan within them.
    pub(crate) fn reserve(
        &mut self,
        op: &'static str,
        spec: &AttentionSpec,
        limits: &PlanLimits,
        splits: Splits,
        schedule: Schedule,
    ) -> Result<()> {
        let at_most = |what: &'static str, got: usize, limit: usize| {
            let expected = || format_args!("at most {limit}, the plan's limit").to_string();
            if got > limit { Err(Error::value(op, what, expected(), got)) } else { Ok(()) }
        };
        at_most("sequences", self.sequences.len(), limits.sequences)?;
        at_most("query tokens", self.total_q, limits.q_tokens)?;
        at_most("entries of the page tables", self.pages.len(), limits.pages)?;
        at_most("words of the tree masks", self.tree_mask.len(), limits.tree_words)?;
        if self.page_size != limits.page_size {
            let expected = format_args!("{}, the plan's limit", limits.page_size).to_string();
            return Err(Error::value(op, "page_size", expected, self.page_size));
        }
        if !self.logical_pages.is_empty() {
            return Err(Error::value(op, "page_lists", "none in a plan with limits", "some"));
        }
        let rows = schedule.range_rows;
        // A fixed split has a state for each tile of rows and section: room for one tile a sequence.
        let any = schedule.all_walk() && splits.section() == 0;
        let too_many = |s: &&Sequence| !any && s.q_len as usize * spec.group() > rows;
        if let Some(s) = self.sequences.iter().find(too_many) {
            let most = rows / spec.group();
            let expected =
                format_args!("at most {most} query tokens a sequence in a plan with limits").to_string();
            return Err(Error::value(op, "query tokens of a sequence", expected, s.q_len));
        }
        if schedule.ranges > 0 {
            self.ranges.resize(schedule.ranges + 1, self.items.len() as u32);
        }
        let sizes = limits.sizes(spec, splits, schedule);
        limits.check(op, &sizes)?;
        self.total_q = limits.q_tokens;
        self.reserved = Some(sizes);
        Ok(())
    }
}
