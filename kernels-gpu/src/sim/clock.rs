//! What has happened before what: vector clocks (Fidge 1988, Mattern 1989) of lanes and of the asynchronous units that
//! work for them.

use std::rc::Rc;
use std::vec::Vec;

/// Who does something: a lane of the cluster, or a unit that works beside the lanes. See [`Agents`].
pub(super) type Agent = u16;

/// Where the agents of a cluster begin: lanes from 0, then for each warp its products (`wgmma`) and its bulk stores, then
/// mbarriers, on whose phases bulk loads complete.
#[derive(Clone, Copy)]
pub(super) struct Agents {
    pub(super) lanes: usize,
}

/// mbarriers of a cluster.
const BARRIERS: usize = 64;

impl Agents {
    pub(super) fn products(self, warp: usize) -> Agent {
        (self.lanes + warp) as Agent
    }

    pub(super) fn stores(self, warp: usize) -> Agent {
        (self.lanes + self.lanes / 32 + warp) as Agent
    }

    /// Of the cluster's `i`-th mbarrier; `None` where there are more than the simulator counts.
    pub(super) fn barrier(self, i: usize) -> Option<Agent> {
        (i < BARRIERS).then_some((self.lanes + self.lanes / 32 * 2 + i) as Agent)
    }

    fn count(self) -> usize {
        self.lanes + self.lanes / 32 * 2 + BARRIERS
    }
}

/// What an agent did, at its own time.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) agent: Agent,
    pub(super) time: u32,
}

/// Set in [`Stamp::agent`]: this agent and the next three, the warps of a warpgroup.
const FOUR: Agent = 0x8000;

impl Stamp {
    pub(super) const NOBODY: Stamp = Stamp { agent: Agent::MAX, time: 0 };

    /// Of all four warps from the one that `agent` is of.
    pub(super) fn of_four(agent: Agent, time: u32) -> Self {
        Stamp { agent: agent | FOUR, time }
    }

    /// Whether this came before what somebody does who knows `clock`, and is agent `me`, where a lane.
    pub(super) fn before(self, clock: &Clock, me: Option<Agent>) -> bool {
        if self.agent == Agent::MAX || Some(self.agent) == me {
            return true;
        }
        let first = (self.agent & !FOUR) as usize;
        let count = if self.agent & FOUR == FOUR { 4 } else { 1 };
        clock.0[first..first + count].iter().all(|&known| known >= self.time)
    }
}

/// For each agent, until which of its times everything it did came before.
#[derive(Clone)]
pub(super) struct Clock(Rc<[u32]>);

impl Clock {
    pub(super) fn new(agents: Agents) -> Self {
        Clock(Rc::from(std::vec![0; agents.count()]))
    }

    pub(super) fn is(&self, other: &Clock) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }

    pub(super) fn known(&self, agent: Agent) -> u32 {
        self.0[agent as usize]
    }

    /// This, and that agents did things until times.
    pub(super) fn with(&self, news: impl Iterator<Item = (Agent, u32)>) -> Self {
        let mut all: Vec<u32> = self.0.to_vec();
        news.for_each(|(agent, time)| all[agent as usize] = all[agent as usize].max(time));
        Clock(all.into())
    }

    fn zip(&self, other: &Clock, f: impl Fn(u32, u32) -> u32) -> Clock {
        Clock(self.0.iter().zip(&*other.0).map(|(&a, &b)| f(a, b)).collect())
    }

    /// What all of `clocks` know.
    pub(super) fn meet<'a>(clocks: impl Iterator<Item = &'a Clock>) -> Option<Clock> {
        let mut distinct: Vec<&Clock> = Vec::new();
        clocks.for_each(|c| {
            if !distinct.iter().any(|d| d.is(c)) {
                distinct.push(c);
            }
        });
        let (first, rest) = distinct.split_first()?;
        Some(rest.iter().fold((*first).clone(), |all, c| all.zip(c, u32::min)))
    }
}

/// Joins clocks. Lanes often join the same two: the last results are kept.
#[derive(Default)]
pub(super) struct Joins(Vec<(Clock, Clock, Clock)>);

impl Joins {
    pub(super) fn join(&mut self, a: &Clock, b: &Clock) -> Clock {
        if a.is(b) {
            return a.clone();
        }
        if let Some((_, _, both)) = self.0.iter().find(|(x, y, _)| x.is(a) && y.is(b)) {
            return both.clone();
        }
        let both = a.zip(b, u32::max);
        if self.0.len() == 16 {
            self.0.remove(0);
        }
        self.0.push((a.clone(), b.clone(), both.clone()));
        both
    }
}
