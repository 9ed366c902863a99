//! Prefixes that sequences of a batch share: attended once for all of them (Hydragen, arXiv:2402.05099; Cascade
//! Inference).

use std::collections::HashMap;
use std::ops::Range;

use ferroflash_kernels::abi::{KV_BLOCK, MergeItem, Sequence, WorkItem, partial_stride};

use super::{Batch, Plan, Schedule, Splits};
use crate::spec::AttentionSpec;

/// KV tokens that sequences side by side have in common, by their page tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedPrefix {
    /// Sequences of the batch.
    pub sequences: Range<usize>,
    /// Tokens; those before them are in a shared prefix of more sequences.
    pub tokens: Range<usize>,
}

/// The prefixes of a plan, and the partial states that become its sequences' rows.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cascade {
    pub(super) prefixes: Vec<SharedPrefix>,
    /// Where each sequence's own KV begins, then where each prefix's does; the prefixes follow the batch's sequences.
    starts: Vec<u32>,
    /// Of each sequence the prefixes, outermost first, and its first row in them, in tokens.
    chains: Vec<Vec<(usize, u32)>>,
    /// First rows of the states of a sequence or prefix and KV head, in the order of KV.
    states: HashMap<(u32, u32), Vec<u32>>,
}

impl Cascade {
    /// Where the KV of a sequence or prefix begins that is only a part of its rows' KV.
    pub(super) fn kv_start(&self, sequence: usize) -> Option<u32> {
        let is_part = self.chains.get(sequence).is_none_or(|chain| !chain.is_empty());
        self.starts.get(sequence).copied().filter(|_| is_part)
    }

    /// Whether the states of a sequence's tiles are merged with others.
    pub(super) fn in_parts(&self, sequence: u32) -> bool {
        self.kv_start(sequence as usize).is_some()
    }

    pub(super) fn add_states(&mut self, tile: &WorkItem, firsts: impl Iterator<Item = u32>) {
        self.states.entry((tile.seq, tile.kv_head)).or_default().extend(firsts);
    }
}

impl Plan {
    /// Prefixes that are read once for several sequences, where their page tables begin alike and that saves bytes;
    /// outer ones first.
    pub fn shared_prefixes(&self) -> &[SharedPrefix] {
        &self.cascade.prefixes
    }

    /// Looks for prefixes, and adds a sequence for each: the queries of its sequences, which stand side by side, over the
    /// prefix alone.
    pub(super) fn find_prefixes(
        &mut self,
        spec: &AttentionSpec,
        batch: &Batch<'_>,
        splits: Splits,
        schedule: Schedule,
    ) {
        let Some(worth) = schedule.cascade.filter(|_| splits != Splits::None) else { return };
        // Under a window or ALiBi rows see a prefix differently, and lists are no prefixes.
        let alike = spec.window.is_none() && spec.alibi_slopes.is_none() && batch.page_lists.is_none();
        if !alike || self.page_size == 0 || self.sequences.len() < 2 {
            return;
        }
        let saved = self.search(spec, schedule.row_tile);
        if self.cascade.prefixes.is_empty() || saved * (spec.num_kv_heads as u64) < worth {
            self.cascade = Cascade::default();
            return;
        }
        let own = self.sequences.len();
        self.cascade.chains = vec![Vec::new(); own];
        self.cascade.starts = vec![0; own];
        for SharedPrefix { sequences, tokens } in self.cascade.prefixes.clone() {
            let (first, last) = (self.sequences[sequences.start], self.sequences[sequences.end - 1]);
            for i in sequences {
                let token = (self.sequences[i].q_start - first.q_start) as u32;
                self.cascade.chains[i].push((self.sequences.len(), token));
                self.cascade.starts[i] = tokens.end as u32;
            }
            self.cascade.starts.push(tokens.start as u32);
            self.sequences.push(Sequence {
                q_start: first.q_start,
                q_len: (last.q_start - first.q_start) as u32 + last.q_len,
                kv_len: tokens.end as u32,
                page_start: first.page_start,
                position: tokens.end as i32,
                ..Sequence::default()
            });
        }
    }

    /// Fills in the prefixes; gives the bytes that they save for each KV head.
    fn search(&mut self, spec: &AttentionSpec, row_tile: usize) -> u64 {
        // Kernels begin at blocks, and under a fixed split states at its sections.
        let unit = self.section.max(KV_BLOCK);
        let rows = |s: &Sequence| s.q_len as usize * spec.group();
        let pages = |s: &Sequence| {
            &self.pages[s.page_start as usize..][..(s.kv_len as usize).div_ceil(self.page_size)]
        };
        // Tokens that all queries of a sequence see.
        let seen = |s: &Sequence| match s.q_len {
            0 => 0,
            _ if rows(s) > row_tile => 0,
            _ if spec.causal => (s.position + 1).max(0) as usize,
            _ => (s.kv_len - s.n_tree) as usize,
        };
        let shared: Vec<usize> = self
            .sequences
            .windows(2)
            .map(|pair| {
                let alike = pages(&pair[0]).iter().zip(pages(&pair[1])).take_while(|(a, b)| a == b).count();
                (alike * self.page_size).min(seen(&pair[0])).min(seen(&pair[1])) / unit * unit
            })
            .collect();
        // 16-bit K and V; a state of each row is written and read once more.
        let token_bytes = 2 * (spec.head_dim + spec.v_head_dim) as u64;
        let state_bytes = 2 * 2 * 4 * partial_stride(spec.v_head_dim) as u64;
        let (mut prefixes, mut saved) = (Vec::new(), 0);
        // Runs of sequences, and the token up to which they are done.
        let mut runs = vec![(0..self.sequences.len(), 0)];
        while let Some((run, start)) = runs.pop() {
            if run.len() < 2 {
                continue;
            }
            let end = shared[run.start..run.end - 1].iter().copied().min().unwrap_or(0);
            // Sequences whose rows fit in one tile, side by side.
            let mut tiles: Vec<Range<usize>> = Vec::new();
            let mut filled = usize::MAX;
            for i in run.clone().filter(|_| end > start) {
                let own = rows(&self.sequences[i]);
                match tiles.last_mut().filter(|_| filled.saturating_add(own) <= row_tile) {
                    Some(tile) => (tile.end, filled) = (i + 1, filled + own),
                    None => (filled, _) = (own, tiles.push(i..i + 1)),
                }
            }
            let gain = |tile: &Range<usize>| {
                let all: u64 = tile.clone().map(|i| rows(&self.sequences[i]) as u64).sum();
                ((tile.len() as u64 - 1) * (end - start) as u64 * token_bytes)
                    .saturating_sub(all * state_bytes)
            };
            if tiles.iter().any(|tile| gain(tile) > 0) {
                for tile in tiles {
                    match gain(&tile) {
                        0 => runs.push((tile, start)),
                        bytes => {
                            saved += bytes;
                            prefixes.push(SharedPrefix { sequences: tile.clone(), tokens: start..end });
                            runs.push((tile, end));
                        }
                    }
                }
                continue;
            }
            // Nothing more that all of them share, or not enough: apart where they share least.
            let mut first = run.start;
            for i in run.start..run.end {
                if i + 1 == run.end || shared[i] == end {
                    runs.push((first..i + 1, start));
                    first = i + 1;
                }
            }
        }
        self.cascade.prefixes = prefixes;
        saved
    }

    /// Merges the states of each sequence's prefixes and of its own KV, in this order.
    pub(super) fn merge_cascade(&mut self, spec: &AttentionSpec) {
        let Cascade { chains, states, .. } = &self.cascade;
        let group = spec.group() as u32;
        for (seq, chain) in chains.iter().enumerate().filter(|(_, chain)| !chain.is_empty()) {
            for kv_head in 0..spec.num_kv_heads as u32 {
                let splits = self.splits.len();
                for &(prefix, token) in chain {
                    let firsts = states.get(&(prefix as u32, kv_head)).into_iter().flatten();
                    self.splits.extend(firsts.map(|&first| first + token * group));
                }
                self.splits.extend(states.get(&(seq as u32, kv_head)).into_iter().flatten());
                self.merges.push(MergeItem {
                    seq: seq as u32,
                    kv_head,
                    row_start: 0,
                    row_end: self.sequences[seq].q_len * group,
                    splits: splits as u32,
                    num_splits: (self.splits.len() - splits) as u32,
                    num_items: 0,
                    reserved: 0,
                });
            }
        }
    }
}
