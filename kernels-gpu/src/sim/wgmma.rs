//! Products of a warpgroup, and what else its four warps do together.

use std::collections::BTreeMap;
use std::format;
use std::panic::Location;
use std::string::String;
use std::vec;
use std::vec::Vec;

use super::clock::{Clock, Stamp};
use super::cluster::Cluster;
use super::lane::{suspend, with};
use super::shared::Actor;
use super::warp::{bf16_value, f16_value};
use crate::tile::fragment::{a_at, c_at};

/// Four warps that begin at a multiple of four.
pub(super) struct Warpgroup {
    /// Registers of each lane.
    registers: u32,
    arrived: u32,
    at: Option<(&'static str, &'static Location<'static>)>,
    /// What each lane brings to the instruction at which they meet, and takes away.
    bring: Vec<Vec<u32>>,
    take: Vec<Vec<u32>>,
    /// Whether `wgmma.fence` came after the last use of registers.
    fenced: bool,
    /// Groups closed, and complete.
    closed: u32,
    complete: u32,
    /// Accumulators on their way, by the number that stands in their registers.
    accumulators: BTreeMap<u32, Accumulator>,
    next: u32,
}

/// `[64, n]`, and the group of its last product.
struct Accumulator {
    values: Vec<f32>,
    n: usize,
    group: u32,
}

impl Warpgroup {
    pub(super) fn new(registers: u32) -> Self {
        Warpgroup {
            registers,
            arrived: 0,
            at: None,
            bring: vec![Vec::new(); 128],
            take: vec![Vec::new(); 128],
            fenced: false,
            closed: 0,
            complete: 0,
            accumulators: BTreeMap::new(),
            next: 0,
        }
    }
}

/// Registers whose results are on their way hold NaNs of this form, with the accumulator's number.
const ON_ITS_WAY: u32 = 0x7fd0_0000;
const NUMBER: u32 = 0xf_ffff;

/// All lanes of a warpgroup bring words to the same line; `model` computes what each takes away.
fn together(
    name: &'static str,
    line: &'static Location<'static>,
    words: Vec<u32>,
    model: impl FnOnce(&mut Cluster<'static>, usize) -> Result<(), String>,
) -> Vec<u32> {
    let wait = with(|c, thread| {
        let (g, lane) = (thread / 128, thread % 128);
        let group = &mut c.warpgroups[g];
        match group.at {
            Some((other, other_line)) if (other, other_line) != (name, line) => {
                let what = format!(
                    "lanes of a warpgroup diverge: this one is at {name}, others at {other}, {other_line}"
                );
                c.raise(thread, Some(line), what)
            }
            _ => group.at = Some((name, line)),
        }
        group.bring[lane] = words;
        group.arrived += 1;
        c.lanes[thread].line = Some(line);
        if group.arrived < 128 {
            return true;
        }
        *c.stats.collectives.entry(name).or_default() += 1;
        (0..4).for_each(|w| c.count_conflicts(4 * g + w));
        let done = model(c, g);
        c.check(thread, line, done);
        (c.warpgroups[g].arrived, c.warpgroups[g].at) = (0, None);
        c.lanes[g * 128..g * 128 + 128].iter_mut().for_each(|l| l.ready = true);
        c.lanes[thread].ready = false;
        false
    });
    if wait {
        suspend();
    }
    with(|c, thread| std::mem::take(&mut c.warpgroups[thread / 128].take[thread % 128]))
}

#[track_caller]
pub(crate) fn wgmma_fence() {
    together("wgmma.fence", Location::caller(), Vec::new(), |c, g| {
        c.warpgroups[g].fenced = true;
        Ok(())
    });
}

#[track_caller]
pub(crate) fn wgmma_commit() {
    together("wgmma.commit_group", Location::caller(), Vec::new(), |c, g| {
        c.warpgroups[g].closed += 1;
        Ok(())
    });
}

/// Where A of a product is.
pub(crate) enum A {
    /// A descriptor, and whether rows run along m.
    Shared(u64, u32),
    Registers([u32; 4]),
}

#[track_caller]
pub(crate) fn wgmma<const T: usize>(
    accumulate: bool,
    d: &mut [[f32; 4]; T],
    a: A,
    (b, trans_b): (u64, u32),
    bf16: bool,
) {
    let mut words: Vec<u32> = d.as_flattened().iter().map(|x| x.to_bits()).collect();
    let (a_words, a_shared) = match a {
        A::Shared(descriptor, trans) => ([descriptor as u32, (descriptor >> 32) as u32, 0, 0], Some(trans)),
        A::Registers(words) => (words, None),
    };
    words.extend(a_words);
    words.extend([b as u32, (b >> 32) as u32]);
    let out = together("wgmma", Location::caller(), words, |c, g| {
        c.product(g, 8 * T, accumulate, a_shared, trans_b, bf16)
    });
    d.as_flattened_mut().iter_mut().zip(out).for_each(|(d, x)| *d = f32::from_bits(x));
}

#[track_caller]
pub(crate) fn wgmma_wait<const T: usize>(d: &mut [[f32; 4]; T], pending: u32) {
    let words = d.as_flattened().iter().map(|x| x.to_bits()).collect();
    let out = together("wgmma.wait_group", Location::caller(), words, |c, g| c.wait_products(g, pending));
    d.as_flattened_mut().iter_mut().zip(out).for_each(|(d, x)| *d = f32::from_bits(x));
}

/// A matrix descriptor (PTX ISA, "Matrix Descriptor Format"), and which way its operand runs.
struct Matrix {
    start: u32,
    leading: u32,
    stride: u32,
    swizzle: u32,
    /// Whether 16-byte chunks run along m or n, not k.
    trans: bool,
}

impl Matrix {
    fn new(descriptor: u64, trans: bool) -> Result<Self, String> {
        let field = |shift: u32| ((descriptor >> shift & 0x3fff) as u32) << 4;
        if descriptor >> 49 & 7 != 0 {
            return Err("a matrix descriptor with a base offset: tiles begin at multiples of 1024".into());
        }
        let swizzle = [0, 128, 64, 32][(descriptor >> 62) as usize];
        Ok(Matrix { start: field(0), leading: field(16), stride: field(32), swizzle, trans })
    }

    /// Address of the chunk with k from `8 k8` of row `row` (not `trans`), or with rows from `8 row8` at `k`.
    fn chunk(&self, row: u32, k: u32) -> u32 {
        let width = self.swizzle.max(16);
        let offset = if !self.trans {
            // `k` counts chunks: two, side by side under a swizzle, a leading offset apart without.
            let across = if self.swizzle == 0 { k * self.leading } else { k * 16 };
            row / 8 * self.stride + row % 8 * width + across
        } else if self.swizzle == 0 {
            row * self.stride + k / 8 * self.leading + k % 8 * 16
        } else {
            // `row` counts chunks.
            let per = width / 16;
            row / per * self.leading + row % per * 16 + k / 8 * self.stride + k % 8 * width
        };
        let linear = self.start + offset;
        let mask = width / 16 - 1;
        linear ^ (linear >> 7 & mask) << 4
    }
}

/// `[rows, 16]` of 16-bit elements by descriptor, as f32, row after row.
fn operand(
    c: &mut Cluster<'_>,
    g: usize,
    clock: &Clock,
    matrix: &Matrix,
    rows: usize,
    value: fn(u16) -> f32,
) -> Result<Vec<f32>, String> {
    let time = c.warpgroups[g].closed + 1;
    let stamp = Stamp::of_four(c.agents.products(4 * g), time);
    let rank = c.rank(128 * g);
    let Cluster { ctas, fences, .. } = c;
    let who = Actor { stamp, clock, lane: None };
    let mut out = vec![0.0; rows * 16];
    let (outer, inner) = if matrix.trans { (rows / 8, 16) } else { (rows, 2) };
    for i in 0..outer {
        for j in 0..inner {
            let words = ctas[rank].shared.read_async(matrix.chunk(i as u32, j as u32), 4, &who, fences)?;
            for e in 0..8 {
                let x = value((words[e / 2] >> (16 * (e % 2))) as u16);
                let (row, k) = if matrix.trans { (8 * i + e, j) } else { (i, 8 * j + e) };
                out[row * 16 + k] = x;
            }
        }
    }
    Ok(out)
}

impl Cluster<'_> {
    /// `D = A B` or `D += A B` of `[64, 16]` and `[16, n]`: exact products, summed in f64 and rounded once, see
    /// [`mma_m16n8k16`](super::mma_m16n8k16).
    fn product(
        &mut self,
        g: usize,
        n: usize,
        accumulate: bool,
        a_shared: Option<u32>,
        trans_b: u32,
        bf16: bool,
    ) -> Result<(), String> {
        if !self.warpgroups[g].fenced {
            return Err("wgmma with no wgmma.fence since its registers could be written".into());
        }
        let value = if bf16 { bf16_value } else { f16_value };
        let lanes = 128 * g..128 * g + 128;
        let clock =
            Clock::meet(self.lanes[lanes].iter().map(|l| &l.clock)).unwrap_or(Clock::new(self.agents));
        let bring = std::mem::take(&mut self.warpgroups[g].bring);
        let r = n / 2;
        let descriptor = |at: usize| -> Result<u64, String> {
            let of = |words: &Vec<u32>| words[at] as u64 | (words[at + 1] as u64) << 32;
            let first = of(&bring[0]);
            match bring.iter().all(|w| of(w) == first) {
                true => Ok(first),
                false => Err("lanes of a warpgroup bring different matrix descriptors".into()),
            }
        };
        let b = Matrix::new(descriptor(r + 4)?, trans_b == 1)?;
        let b = operand(self, g, &clock, &b, n, value)?;
        let a = match a_shared {
            Some(trans) => {
                let a = Matrix::new(descriptor(r)?, trans == 1)?;
                operand(self, g, &clock, &a, 64, value)?
            }
            None => {
                let mut a = vec![0.0; 64 * 16];
                for (lane, words) in bring.iter().enumerate() {
                    for i in 0..8 {
                        let (row, k) = a_at(lane % 32, i);
                        a[(lane / 32 * 16 + row) * 16 + k] =
                            value((words[r + i / 2] >> (16 * (i % 2))) as u16);
                    }
                }
                a
            }
        };

        let group = &mut self.warpgroups[g];
        let token = bring[0][0];
        let on_its_way = accumulate && token & !NUMBER == ON_ITS_WAY;
        let number = if on_its_way { token & NUMBER } else { group.next };
        let mut d = if on_its_way {
            match group.accumulators.remove(&number) {
                Some(d) if d.n == n => d.values,
                _ => return Err("accumulators of another product".into()),
            }
        } else {
            group.next = (group.next + 1) & NUMBER;
            let mut d = vec![0.0; 64 * n];
            if accumulate {
                for_each_register(n, |lane, i, at| d[at] = f32::from_bits(bring[lane][i]));
            }
            d
        };
        multiply(&mut d, &a, &b, n);
        let last = group.closed + 1;
        group.accumulators.insert(number, Accumulator { values: d, n, group: last });
        group.take.iter_mut().for_each(|t| *t = vec![ON_ITS_WAY | number; r]);
        group.bring = bring;
        Ok(())
    }

    fn wait_products(&mut self, g: usize, pending: u32) -> Result<(), String> {
        let group = &mut self.warpgroups[g];
        group.complete = group.complete.max(group.closed.saturating_sub(pending));
        group.fenced = false;
        let complete = group.complete;
        let token = group.bring[0][0];
        if token & !NUMBER == ON_ITS_WAY
            && let Some(d) = group.accumulators.get(&(token & NUMBER))
        {
            if d.group > complete {
                return Err(format!(
                    "accumulators of wgmma group {}, of which the wait has {complete} complete",
                    d.group
                ));
            }
            let (values, n) = (&d.values, d.n);
            let mut take = vec![vec![0; n / 2]; 128];
            for_each_register(n, |lane, i, at| take[lane][i] = values[at].to_bits());
            group.take = take;
            group.accumulators.remove(&(token & NUMBER));
        } else {
            group.take = group.bring.clone();
        }
        // Each warp knows of its own products.
        for w in 4 * g..4 * g + 4 {
            let agent = self.agents.products(w);
            for lane in 32 * w..32 * w + 32 {
                if self.lanes[lane].clock.known(agent) < complete {
                    let known = self.lanes[lane].clock.with([(agent, complete)].into_iter());
                    // Lanes that knew the same know the same again.
                    for other in lane + 1..32 * w + 32 {
                        if self.lanes[other].clock.is(&self.lanes[lane].clock) {
                            self.lanes[other].clock = known.clone();
                        }
                    }
                    self.lanes[lane].clock = known;
                }
            }
        }
        Ok(())
    }
}

/// `f(lane, register, place in [64, n])` for all accumulators of a warpgroup.
fn for_each_register(n: usize, mut f: impl FnMut(usize, usize, usize)) {
    for lane in 0..128 {
        for i in 0..n / 2 {
            let (row, column) = c_at(lane % 32, i % 4);
            f(lane, i, (lane / 32 * 16 + row) * n + i / 4 * 8 + column);
        }
    }
}

/// `D[64, n] += A[64, 16] B^T`, B's rows its columns.
fn multiply(d: &mut [f32], a: &[f32], b: &[f32], n: usize) {
    // B as [16, n], so that the inner loop runs along memory.
    let mut columns = vec![0f64; 16 * n];
    for (j, row) in b.chunks(16).enumerate() {
        row.iter().enumerate().for_each(|(k, &x)| columns[k * n + j] = x as f64);
    }
    let mut sums = vec![0f64; n];
    for (d, a) in d.chunks_mut(n).zip(a.chunks(16)) {
        sums.iter_mut().zip(&*d).for_each(|(s, &x)| *s = x as f64);
        for (&a, b) in a.iter().zip(columns.chunks(n)) {
            let a = a as f64;
            sums.iter_mut().zip(b).for_each(|(s, &b)| *s += a * b);
        }
        d.iter_mut().zip(&sums).for_each(|(d, &s)| *d = s as f32);
    }
}

/// `setmaxnreg`: lanes of the warpgroup have `n` registers from now on; for more it waits until others have given
/// theirs back.
#[track_caller]
pub(crate) fn set_registers(n: u32, up: bool) {
    let line = Location::caller();
    together("setmaxnreg", line, Vec::new(), |c, g| {
        let rank = c.rank(128 * g);
        let has = c.warpgroups[g].registers;
        if up && n < has || !up && n > has {
            return Err(format!("setmaxnreg.{} {n} with {has} registers", if up { "inc" } else { "dec" }));
        }
        if !up {
            c.ctas[rank].free_registers += 128 * (has - n);
            c.warpgroups[g].registers = n;
            // Those that wait look again.
            c.lanes.iter_mut().filter(|l| l.wants_registers).for_each(|l| l.ready = true);
        }
        Ok(())
    });
    if !up {
        return;
    }
    loop {
        let granted = with(|c, thread| {
            let (g, rank) = (thread / 128, c.rank(thread));
            let has = c.warpgroups[g].registers;
            let more = 128 * n.saturating_sub(has);
            let granted = more <= c.ctas[rank].free_registers;
            if granted {
                c.ctas[rank].free_registers -= more;
                c.warpgroups[g].registers = n;
            }
            c.lanes[thread].wants_registers = !granted;
            granted
        });
        if granted {
            return;
        }
        suspend();
    }
}
