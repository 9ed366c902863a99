//! A launch: clusters in drawn order, the lanes of each as coroutines beside the work that copies and products do by
//! themselves.

use std::any::Any;
use std::cell::RefCell;
use std::format;
use std::panic::{AssertUnwindSafe, Location, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::string::{String, ToString};
use std::vec::Vec;

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult};

use super::barrier::Barriers;
use super::bulk::Bulk;
use super::clock::{Agents, Clock, Joins};
use super::global::{Acquired, Global, Releases};
use super::lane::{self, Lane};
use super::shared::Shared;
use super::warp::Warp;
use super::wgmma::Warpgroup;
use super::{Fault, Memory, Rng, Stats};

/// Host stack of one lane; taken from the system as it is used.
const STACK: usize = 1 << 20;

/// What the simulator has to know of an entry.
#[derive(Clone, Copy)]
pub struct Kernel {
    /// Entry name.
    pub name: &'static str,
    /// Lanes of a CTA, a multiple of 32.
    pub threads: u32,
    /// CTAs of a cluster, side by side in x.
    pub cluster: u32,
    /// Bytes of dynamic shared memory.
    pub shared_bytes: u32,
    /// One lane's run; the argument points to the parameter struct.
    pub run: fn(*const u8),
}

/// One launch.
pub struct Launch<'a> {
    /// The entry.
    pub kernel: Kernel,
    /// CTAs in x and y; x a multiple of the cluster.
    pub grid: [u32; 2],
    /// Bytes of the parameter struct, 8-byte aligned.
    pub params: &'a [u64],
    /// Draws every order that a GPU leaves open.
    pub seed: u64,
    /// Number of the launch on its device.
    pub number: u64,
}

/// A CTA of the running cluster.
pub(super) struct Cta {
    pub(super) block: [u32; 2],
    pub(super) shared: Shared,
    pub(super) barriers: Barriers,
    /// Registers that no warpgroup has.
    pub(super) free_registers: u32,
    /// What its lanes have learnt of other CTAs.
    pub(super) acquired: Rc<Vec<Acquired>>,
}

/// A running cluster. Lanes, numbered through its CTAs, reach it by a raw pointer, one at a time.
pub(super) struct Cluster<'a> {
    pub(super) launch: &'a Launch<'a>,
    pub(super) ctas: Vec<Cta>,
    pub(super) lanes: Vec<Lane>,
    pub(super) warps: Vec<Warp>,
    pub(super) warpgroups: Vec<Warpgroup>,
    pub(super) global: Global<'a>,
    pub(super) releases: Releases,
    pub(super) rng: Rng,
    pub(super) stats: Stats,
    pub(super) agents: Agents,
    pub(super) joins: Joins,
    /// When each lane has fenced its stores for the async proxy.
    pub(super) fences: Vec<Vec<u32>>,
    /// Bulk copies on their way.
    pub(super) bulk: Bulk,
    /// mbarriers initialised so far.
    pub(super) mbarriers: usize,
    /// Lane of each warp that `elect` chooses.
    pub(super) elected: usize,
    /// Lanes waiting at the barrier of the cluster.
    pub(super) at_cluster_barrier: Vec<usize>,
}

std::thread_local! {
    static STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
}

/// When bulk copies arrive. The extremes show most: late, what is used before it is there; early, what is overwritten
/// before all have used it.
#[derive(Clone, Copy, PartialEq)]
enum Arrival {
    Early,
    Drawn,
    /// When all lanes wait for one.
    Late,
}

type LaneCoroutine = Coroutine<(), (), (), DefaultStack>;

/// Runs all CTAs.
///
/// # Errors
/// The first [`Fault`].
pub fn launch(memory: &Memory, launch: &Launch<'_>) -> Result<Stats, Fault> {
    let mut rng = Rng(launch.seed ^ launch.number.wrapping_mul(0x9E37_79B9));
    let Kernel { threads, cluster: size, shared_bytes, .. } = launch.kernel;
    let columns = launch.grid[0].div_ceil(size) as u64;
    let total = columns * launch.grid[1] as u64;
    // A drawn start and stride give an order without a list of all clusters.
    let start = if total > 0 { rng.bits() % total } else { 0 };
    let backwards = rng.bits() & 1 == 1;
    let agents = Agents { lanes: (size * threads) as usize };
    let cta = || Cta {
        block: [0; 2],
        shared: Shared::new(shared_bytes, agents),
        barriers: Barriers::default(),
        free_registers: 0,
        acquired: Rc::default(),
    };
    let mut cluster = Cluster {
        launch,
        ctas: (0..size).map(|_| cta()).collect(),
        lanes: Vec::new(),
        warps: Vec::new(),
        warpgroups: Vec::new(),
        global: memory.lock(),
        releases: Releases::default(),
        elected: rng.below(32),
        rng,
        stats: Stats::default(),
        agents,
        joins: Joins::default(),
        fences: Vec::new(),
        bulk: Bulk::default(),
        mbarriers: 0,
        at_cluster_barrier: Vec::new(),
    };
    for i in 0..total {
        let i = if backwards { total - 1 - i } else { i };
        let index = (start + i) % total;
        let (x, y) = ((index % columns) as u32 * size, (index / columns) as u32);
        cluster.ctas.iter_mut().enumerate().for_each(|(rank, cta)| cta.block = [x + rank as u32, y]);
        catch_unwind(AssertUnwindSafe(|| cluster.run())).map_err(|panic| cluster.as_fault(panic))?;
    }
    cluster.stats.launches.insert(launch.kernel.name, 1);
    cluster.stats.distinct_read = cluster.global.distinct_bytes();
    Ok(cluster.stats)
}

impl Cluster<'_> {
    /// CTA of a lane.
    pub(super) fn rank(&self, thread: usize) -> usize {
        thread / self.launch.kernel.threads as usize
    }

    fn run(&mut self) {
        let threads = self.agents.lanes;
        let clock = Clock::new(self.agents);
        self.lanes = (0..threads).map(|_| Lane::new(clock.clone())).collect();
        self.warps = (0..threads.div_ceil(32)).map(|_| Warp::default()).collect();
        let registers = lane::launch_registers(self.launch.kernel.threads);
        self.warpgroups = (0..threads.div_ceil(128)).map(|_| Warpgroup::new(registers)).collect();
        self.fences = (0..threads).map(|_| Vec::new()).collect();
        for cta in &mut self.ctas {
            cta.shared.reset();
            cta.acquired = Rc::default();
            (cta.barriers, cta.free_registers) = (Barriers::default(), 0);
        }
        (self.bulk, self.mbarriers) = (Bulk::default(), 0);
        self.at_cluster_barrier.clear();
        let cluster: *mut Cluster<'_> = self;
        let run = self.launch.kernel.run;
        let params = self.launch.params.as_ptr().cast::<u8>();
        let mut coroutines: Vec<LaneCoroutine> = (0..threads)
            .map(|thread| {
                Coroutine::with_stack(stack(), move |yielder, ()| {
                    lane::enter(thread, yielder);
                    run(params);
                })
            })
            .collect();
        let arrival = [Arrival::Early, Arrival::Drawn, Arrival::Late][self.rng.below(3)];
        // Turns that a warp is left out, now and then: on a GPU nothing keeps warps in step. In every other cluster one
        // warp lags all the time.
        let laggard = self.rng.below(2 * self.warps.len());
        let mut stalls: Vec<u32> = self.warps.iter().map(|_| 0).collect();
        let mut live = threads;
        while live > 0 {
            let first = self.rng.below(self.warps.len());
            let mut progress = false;
            for i in 0..self.warps.len() {
                let warp = (first + i) % self.warps.len();
                if stalls[warp] > 0 {
                    stalls[warp] -= 1;
                    progress |= self.lanes[warp * 32..warp * 32 + 32].iter().any(|l| l.ready);
                    continue;
                }
                if self.rng.below(if warp == laggard { 2 } else { 128 }) == 0 {
                    stalls[warp] = self.rng.below(64) as u32;
                }
                let turn = self.rng.below(32);
                for j in 0..32 {
                    let thread = warp * 32 + (turn + j) % 32;
                    if !self.lanes[thread].ready {
                        continue;
                    }
                    progress = true;
                    self.lanes[thread].ready = false;
                    lane::set_current(cluster.cast(), thread);
                    if let CoroutineResult::Return(()) = coroutines[thread].resume(()) {
                        self.lanes[thread].done = true;
                        live -= 1;
                    }
                }
            }
            let arrives = match arrival {
                Arrival::Early => true,
                Arrival::Drawn => self.rng.below(2) == 0,
                Arrival::Late => false,
            };
            if arrives || !progress {
                while self.finish_one_bulk() {
                    progress = true;
                    if arrival != Arrival::Early {
                        break;
                    }
                }
            }
            if !progress && live > 0 {
                self.deadlock();
            }
        }
        while self.finish_one_bulk() {}
        STACKS.with_borrow_mut(|stacks| stacks.extend(coroutines.into_iter().map(Coroutine::into_stack)));
    }

    fn deadlock(&self) -> ! {
        let mut places: Vec<(String, Vec<usize>)> = Vec::new();
        for (thread, lane) in self.lanes.iter().enumerate() {
            let place = match (lane.done, lane.line) {
                (true, _) => "returned".to_string(),
                (false, Some(line)) => format!("waits at {line}"),
                (false, None) => "waits".to_string(),
            };
            match places.iter_mut().find(|p| p.0 == place) {
                Some(p) => p.1.push(thread),
                None => places.push((place, Vec::from([thread]))),
            }
        }
        let list: Vec<String> =
            places.iter().map(|(place, threads)| format!("{} ({threads:?})", place)).collect();
        let waiting = self.lanes.iter().position(|l| !l.done).unwrap_or(0);
        self.raise(waiting, self.lanes[waiting].line, format!("deadlock: {}", list.join("; ")))
    }

    fn in_cta(&self, thread: usize) -> u32 {
        thread as u32 % self.launch.kernel.threads
    }

    /// Ends the launch; coroutines that are left are unwound.
    pub(super) fn raise(&self, thread: usize, line: Option<&Location<'_>>, what: String) -> ! {
        resume_unwind(std::boxed::Box::new(Fault {
            kernel: self.launch.kernel.name.to_string(),
            block: self.ctas[self.rank(thread)].block,
            thread: self.in_cta(thread),
            line: line.map_or_else(String::new, |l| l.to_string()),
            what,
            seed: self.launch.seed,
        }))
    }

    /// A panic of the kernel itself (an index out of range, an overflow) is a fault too.
    fn as_fault(&self, panic: std::boxed::Box<dyn Any + Send>) -> Fault {
        let text = match panic.downcast::<Fault>() {
            Ok(fault) => return *fault,
            Err(panic) => match panic.downcast_ref::<&str>() {
                Some(text) => text.to_string(),
                None => panic.downcast_ref::<String>().cloned().unwrap_or_default(),
            },
        };
        Fault {
            kernel: self.launch.kernel.name.to_string(),
            block: self.ctas[self.rank(lane::current_thread())].block,
            thread: self.in_cta(lane::current_thread()),
            line: String::new(),
            what: format!("panic: {text}"),
            seed: self.launch.seed,
        }
    }
}

fn stack() -> DefaultStack {
    STACKS.with_borrow_mut(Vec::pop).unwrap_or_else(|| match DefaultStack::new(STACK) {
        Ok(stack) => stack,
        Err(error) => panic!("the simulator needs {STACK} bytes of stack for each lane: {error}"),
    })
}
