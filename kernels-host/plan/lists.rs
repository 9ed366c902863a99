//! Tiles of queries against lists of pages: block-sparse attention.

use ferroflash_kernels::abi::{Sequence, WorkItem};

use super::{Batch, PageLists, Plan, Schedule, check_indptr, check_rows, token_count, work_item};
use crate::error::{Error, Result};
use crate::spec::AttentionSpec;

impl Plan {
    /// As [`Plan::tiles`], against the pages of lists. The plan's page table becomes one of lists.
    pub(super) fn listed_tiles(
        &mut self,
        op: &'static str,
        spec: &AttentionSpec,
        lists: &PageLists<'_>,
        batch: &Batch<'_>,
        schedule: Schedule,
    ) -> Result<Vec<WorkItem>> {
        if self.page_size == 0
            || batch.tree.is_some()
            || !batch.tail_slots.is_empty()
            || spec.alibi_slopes.is_some()
        {
            let expected = "paged float KV, no tree, no ALiBi";
            return Err(Error::value(op, "page_lists with", expected, "another"));
        }
        if lists.q_tile == 0 {
            return Err(Error::value(op, "q_tile", "at least 1", 0));
        }
        check_indptr(op, "page_lists.indptr", lists.indptr)?;
        let heads = if lists.per_head { spec.num_kv_heads } else { 1 };
        let per_sequence = |s: &Sequence| heads * (s.q_len as usize).div_ceil(lists.q_tile);
        let count: usize = self.sequences.iter().map(per_sequence).sum();
        if lists.indptr.len() != count + 1 {
            let expected = format_args!("{} entries, for {count} lists", count + 1).to_string();
            return Err(Error::value(op, "page_lists.indptr", expected, lists.indptr.len()));
        }
        if lists.indptr[count] as usize > lists.pages.len() {
            let expected = format_args!("at least {} entries", lists.indptr[count]).to_string();
            return Err(Error::value(op, "page_lists.pages", expected, lists.pages.len()));
        }
        let table = std::mem::take(&mut self.pages);
        self.logical_pages = lists.pages[..lists.indptr[count] as usize].to_vec();
        let (mut tiles, mut list) = (Vec::new(), 0);
        for (index, s) in self.sequences.iter().enumerate() {
            let rows = check_rows(op, spec, s)?;
            let num_pages = (s.kv_len as usize).div_ceil(self.page_size);
            let own = &table[s.page_start as usize..][..num_pages];
            let list_rows = lists.q_tile.saturating_mul(spec.group());
            let starts = (0..rows).step_by(list_rows);
            for (head, row_start) in (0..heads).flat_map(|head| starts.clone().map(move |row| (head, row))) {
                let range = lists.indptr[list] as usize..lists.indptr[list + 1] as usize;
                let logical = &lists.pages[range.clone()];
                check_list(op, logical, num_pages, (index, head, row_start / list_rows))?;
                self.pages.extend(logical.iter().map(|&page| own[page as usize]));
                let mut tokens = logical.len() * self.page_size;
                if logical.last().is_some_and(|&page| page as usize + 1 == num_pages) {
                    // The sequence's last page is not full.
                    tokens -= num_pages * self.page_size - s.kv_len as usize;
                }
                let kv_end = token_count(op, tokens)?;
                let row_end = row_start.saturating_add(list_rows).min(rows);
                for kv_head in if lists.per_head { head..head + 1 } else { 0..spec.num_kv_heads } {
                    for start in (row_start..row_end).step_by(schedule.row_tile) {
                        let end = (start + schedule.row_tile).min(row_end);
                        let tile = work_item(index, kv_head, start, end, range.start as u64);
                        tiles.push(WorkItem { kv_end, ..tile });
                    }
                }
                list += 1;
            }
        }
        Ok(tiles)
    }
}

fn check_list(op: &'static str, list: &[u32], num_pages: usize, whose: (usize, usize, usize)) -> Result<()> {
    let (sequence, head, tile) = whose;
    if let Some(at) = list.windows(2).position(|w| w[0] >= w[1]) {
        let got =
            format!("{} then {} (sequence {sequence}, head {head}, tile {tile})", list[at], list[at + 1]);
        return Err(Error::value(op, "page_lists.pages", "ascending pages in each list", got));
    }
    match list.last() {
        Some(&page) if page as usize >= num_pages => {
            let what = format!("page_lists.pages of sequence {sequence}, head {head}, tile {tile}");
            Err(Error::Index { op, what, index: page as i64, limit: num_pages as u64 })
        }
        _ => Ok(()),
    }
}
