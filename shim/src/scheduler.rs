//! Which tokens run in the next step: continuous batching over a pool of KV pages.
//!
//! First come, first served. Running generations go on (one token each while they decode, a chunk of
//! the prompt before); what is left of the step's budget admits waiting ones, while pages are free.
//! When pages run out the newest generation gives its own back and waits: it is recomputed later, with
//! the same result, since a token's logits do not depend on how they came about.

use std::collections::VecDeque;

use crate::model::forward::Step;
use crate::sequence::Sequence;

/// Bounds of a step.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Generations under way at once.
    pub max_sequences: usize,
    /// Tokens of a step; at least `max_sequences`.
    pub max_step_tokens: usize,
    /// Pages of the pool.
    pub num_pages: usize,
    /// Tokens of a page.
    pub page_size: usize,
    /// Whether sequences have tails (int4).
    pub tails: bool,
}

/// Waiting and running generations, and the free pages.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    free_pages: Vec<u32>,
    free_tails: Vec<u32>,
    preemptions: usize,
}

/// A running generation's part of a step: which one, and how many tokens.
pub type Part = (usize, usize);

impl Scheduler {
    /// An empty schedule over a free pool.
    pub fn new(limits: Limits) -> Self {
        Scheduler {
            limits,
            waiting: VecDeque::new(),
            running: Vec::new(),
            free_pages: (0..limits.num_pages as u32).rev().collect(),
            free_tails: (0..limits.max_sequences as u32).rev().collect(),
            preemptions: 0,
        }
    }

    /// Tokens that one generation may have in the cache.
    pub fn capacity(&self) -> usize {
        self.limits.num_pages * self.limits.page_size
    }

    /// Queues a generation, which must fit into [`Scheduler::capacity`] to its end.
    pub fn add(&mut self, sequence: Sequence) {
        self.waiting.push_back(sequence);
    }

    /// Generations that wait.
    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether nothing waits or runs.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// How often a generation had to give its pages back.
    pub fn preemptions(&self) -> usize {
        self.preemptions
    }

    /// A running generation.
    pub fn running(&mut self, index: usize) -> &mut Sequence {
        &mut self.running[index]
    }

    /// Picks the next step's parts and gives them pages.
    pub fn schedule(&mut self) -> Vec<Part> {
        let mut parts = Vec::new();
        let mut budget = self.limits.max_step_tokens;
        let preemptions = self.preemptions;
        let mut i = 0;
        while i < self.running.len() && budget > 0 {
            let n = (self.running[i].tokens.len() - self.running[i].computed).min(budget);
            while !self.reserve(i, n) {
                self.preempt_newest();
                if self.running.len() <= i {
                    return parts;
                }
            }
            parts.push((i, n));
            budget -= n;
            i += 1;
        }
        while budget > 0 && preemptions == self.preemptions && self.admit() {
            let i = self.running.len() - 1;
            let n = self.running[i].tokens.len().min(budget);
            self.reserve(i, n);
            parts.push((i, n));
            budget -= n;
        }
        parts
    }

    /// The step's tokens and tables for the model.
    pub fn step(&self, parts: &[Part]) -> Step {
        let mut step = Step { qo_indptr: vec![0], ..Default::default() };
        for &(i, n) in parts {
            let sequence = &self.running[i];
            let end = sequence.computed + n;
            step.tokens.extend_from_slice(&sequence.tokens[sequence.computed..end]);
            step.qo_indptr.push(step.tokens.len() as u32);
            step.seq_lens.push(end as u32);
            step.page_tables.push(sequence.pages.clone());
            if self.limits.tails {
                step.tail_slots.push(sequence.tail_slot);
            }
            if end == sequence.tokens.len() {
                step.logits_rows.push(step.tokens.len() - 1);
            }
        }
        step
    }

    /// Takes finished generations out; their pages are free again.
    pub fn take_finished(&mut self) -> Vec<Sequence> {
        let (finished, running) = self.running.drain(..).partition(|s| s.finish.is_some());
        self.running = running;
        let mut finished: Vec<Sequence> = finished;
        finished.iter_mut().for_each(|s| self.release(s));
        finished
    }

    /// Takes everything of a request out.
    pub fn cancel(&mut self, request: u64) {
        self.waiting.retain(|s| s.request != request);
        let (mut out, running): (Vec<_>, Vec<_>) = self.running.drain(..).partition(|s| s.request == request);
        self.running = running;
        out.iter_mut().for_each(|s| self.release(s));
    }

    /// Gives running generation `i` pages for `n` more tokens; false where there are too few.
    fn reserve(&mut self, i: usize, n: usize) -> bool {
        let sequence = &mut self.running[i];
        let needed = (sequence.computed + n).div_ceil(self.limits.page_size);
        let missing = needed.saturating_sub(sequence.pages.len());
        if missing > self.free_pages.len() {
            return false;
        }
        let rest = self.free_pages.len() - missing;
        sequence.pages.extend(self.free_pages.drain(rest..).rev());
        true
    }

    fn preempt_newest(&mut self) {
        if let Some(mut newest) = self.running.pop() {
            self.release(&mut newest);
            self.waiting.push_front(newest);
            self.preemptions += 1;
        }
    }

    /// Starts the first waiting generation where there is room for all of its tokens and one more.
    fn admit(&mut self) -> bool {
        let Some(next) = self.waiting.front() else { return false };
        // Alone it always fits: `add` asks for that.
        let tokens = (next.tokens.len() + 1).min(self.capacity());
        let needed = tokens.div_ceil(self.limits.page_size);
        if self.running.len() >= self.limits.max_sequences || needed > self.free_pages.len() {
            return false;
        }
        if let Some(mut next) = self.waiting.pop_front() {
            next.tail_slot = self.free_tails.pop().unwrap_or(0);
            self.running.push(next);
        }
        true
    }

    fn release(&mut self, sequence: &mut Sequence) {
        self.free_pages.append(&mut sequence.pages);
        self.free_tails.push(sequence.tail_slot);
        sequence.computed = 0;
    }
}

#[cfg(test)]
mod tests {
    use ferroflash::op::sample::SamplingParams;

    use super::*;
    use crate::sequence::{Finish, Generation};

    fn generation(max_tokens: usize) -> Generation {
        let sampling = SamplingParams::default();
        Generation { max_tokens, sampling, stop: Vec::new(), ignore_eos: false, logprobs: None }
    }

    /// Runs a schedule to its end with a model that always says 7, checking its promises at each step.
    fn run(limits: Limits, prompts: &[usize], max_tokens: usize) -> (usize, usize) {
        let mut scheduler = Scheduler::new(limits);
        for (i, &n) in prompts.iter().enumerate() {
            scheduler.add(Sequence::new(i as u64, 0, vec![1; n], generation(max_tokens)));
        }
        let mut finished = 0;
        for _ in 0..100_000 {
            if scheduler.is_idle() {
                break;
            }
            let parts = scheduler.schedule();
            assert!(!parts.is_empty(), "a step without work");
            let step = scheduler.step(&parts);
            assert!(step.tokens.len() <= limits.max_step_tokens && parts.len() <= limits.max_sequences);
            let mut pages: Vec<u32> = step.page_tables.concat();
            let used = pages.len();
            pages.sort_unstable();
            pages.dedup();
            assert_eq!(pages.len(), used, "a page in two places");
            for (table, &len) in step.page_tables.iter().zip(&step.seq_lens) {
                assert_eq!(table.len(), (len as usize).div_ceil(limits.page_size));
            }
            for (i, n) in parts {
                let sequence = scheduler.running(i);
                sequence.computed += n;
                if sequence.computed == sequence.tokens.len() {
                    sequence.tokens.push(7);
                    if sequence.num_generated() == max_tokens {
                        sequence.finish = Some(Finish::Length);
                    }
                }
            }
            finished += scheduler.take_finished().len();
        }
        assert_eq!(scheduler.free_pages.len(), limits.num_pages);
        assert_eq!(scheduler.free_tails.len(), limits.max_sequences);
        (finished, scheduler.preemptions())
    }

    #[test]
    fn everything_finishes_with_pages_to_spare() {
        let limits =
            Limits { max_sequences: 4, max_step_tokens: 16, num_pages: 100, page_size: 4, tails: false };
        assert_eq!(run(limits, &[1, 50, 3, 17, 2, 30, 8], 20), (7, 0));
    }

    #[test]
    fn everything_finishes_when_pages_run_out() {
        let limits =
            Limits { max_sequences: 4, max_step_tokens: 16, num_pages: 18, page_size: 4, tails: true };
        let (finished, preemptions) = run(limits, &[1, 50, 3, 17, 2, 30, 8], 20);
        assert_eq!(finished, 7);
        assert!(preemptions > 0);
    }
}
