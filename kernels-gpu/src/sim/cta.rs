//! A launch: CTAs in drawn order, the lanes of each as coroutines.

use std::any::Any;
use std::cell::RefCell;
use std::format;
use std::panic::{AssertUnwindSafe, Location, catch_unwind, resume_unwind};
use std::string::{String, ToString};
use std::vec::Vec;

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult};

use super::global::Global;
use super::lane::{self, Lane};
use super::shared::Shared;
use super::warp::Warp;
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
    /// Bytes of dynamic shared memory.
    pub shared_bytes: u32,
    /// One lane's run; the argument points to the parameter struct.
    pub run: fn(*const u8),
}

/// One launch.
pub struct Launch<'a> {
    /// The entry.
    pub kernel: Kernel,
    /// CTAs in x and y.
    pub grid: [u32; 2],
    /// Bytes of the parameter struct, 8-byte aligned.
    pub params: &'a [u64],
    /// Draws every order that a GPU leaves open.
    pub seed: u64,
    /// Number of the launch on its device.
    pub number: u64,
}

/// A running CTA. Lanes reach it by a raw pointer, one at a time.
pub(super) struct Cta<'a> {
    pub(super) launch: &'a Launch<'a>,
    pub(super) block: [u32; 2],
    pub(super) lanes: Vec<Lane>,
    pub(super) warps: Vec<Warp>,
    pub(super) shared: Shared,
    pub(super) global: Global<'a>,
    pub(super) rng: Rng,
    pub(super) stats: Stats,
    /// Lanes waiting at the barrier, and barriers passed.
    pub(super) at_barrier: u32,
    pub(super) epoch: u32,
}

std::thread_local! {
    static STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
}

type LaneCoroutine = Coroutine<(), (), (), DefaultStack>;

/// Runs all CTAs.
///
/// # Errors
/// The first [`Fault`].
pub fn launch(memory: &Memory, launch: &Launch<'_>) -> Result<Stats, Fault> {
    let mut rng = Rng(launch.seed ^ launch.number.wrapping_mul(0x9E37_79B9));
    let total = launch.grid[0] as u64 * launch.grid[1] as u64;
    // A drawn start and stride give an order without a list of all CTAs.
    let start = if total > 0 { rng.bits() % total } else { 0 };
    let backwards = rng.bits() & 1 == 1;
    let mut cta = Cta {
        launch,
        block: [0; 2],
        lanes: Vec::new(),
        warps: Vec::new(),
        shared: Shared::new(launch.kernel.shared_bytes),
        global: memory.lock(),
        rng,
        stats: Stats::default(),
        at_barrier: 0,
        epoch: 0,
    };
    for i in 0..total {
        let i = if backwards { total - 1 - i } else { i };
        let index = (start + i) % total;
        cta.block = [(index % launch.grid[0] as u64) as u32, (index / launch.grid[0] as u64) as u32];
        catch_unwind(AssertUnwindSafe(|| cta.run())).map_err(|panic| cta.as_fault(panic))?;
    }
    Ok(cta.stats)
}

impl Cta<'_> {
    fn run(&mut self) {
        let threads = self.launch.kernel.threads;
        self.lanes = (0..threads).map(|_| Lane::default()).collect();
        self.warps = (0..threads.div_ceil(32)).map(|_| Warp::default()).collect();
        self.shared.reset();
        (self.at_barrier, self.epoch) = (0, 0);
        let cta: *mut Cta<'_> = self;
        let run = self.launch.kernel.run;
        let params = self.launch.params.as_ptr().cast::<u8>();
        let mut coroutines: Vec<LaneCoroutine> = (0..threads as usize)
            .map(|thread| {
                Coroutine::with_stack(stack(), move |yielder, ()| {
                    lane::enter(thread, yielder);
                    run(params);
                })
            })
            .collect();
        let mut live = threads;
        while live > 0 {
            let first = self.rng.below(self.warps.len());
            let mut progress = false;
            for i in 0..self.warps.len() {
                let warp = (first + i) % self.warps.len();
                let turn = self.rng.below(32);
                for j in 0..32 {
                    let thread = warp * 32 + (turn + j) % 32;
                    if !self.lanes[thread].ready {
                        continue;
                    }
                    progress = true;
                    self.lanes[thread].ready = false;
                    lane::set_current(cta.cast(), thread);
                    if let CoroutineResult::Return(()) = coroutines[thread].resume(()) {
                        self.lanes[thread].done = true;
                        live -= 1;
                    }
                }
            }
            if !progress {
                self.deadlock();
            }
        }
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

    /// Ends the launch; coroutines that are left are unwound.
    pub(super) fn raise(&self, thread: usize, line: Option<&Location<'_>>, what: String) -> ! {
        resume_unwind(std::boxed::Box::new(Fault {
            kernel: self.launch.kernel.name.to_string(),
            block: self.block,
            thread: thread as u32,
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
            block: self.block,
            thread: lane::current_thread() as u32,
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
