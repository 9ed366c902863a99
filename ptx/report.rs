//! What Hopper's prefill kernels do for each block of KV, beside the least that could do it. Shared by the tests and the
//! examples.
#![allow(dead_code)] // each user takes a part

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use ferroflash_kernels::abi::{PREFILL_SM90, PrefillTile, SM90_REGISTERS};

use super::assemble::{Code, Loop, Tools};
use super::compile::Manifest;

/// Tensor-core operations that an SM does in a cycle: 989 TFLOP/s of 132 SMs at 1.83 GHz (H100 SXM, dense f16; NVIDIA's
/// data sheet). Exponentials: 16 a cycle (CUDA programming guide, arithmetic throughput).
const FLOP_PER_CYCLE: u32 = 4096;
const EXP_PER_CYCLE: u32 = 16;

/// The least of each that a consumer's lane needs for a block of `N` tokens: a product for 16 channels of K and for 16
/// tokens of V; for each of its `N / 2` scores a maximum, a multiply-add, an exponential and a sum; half as many
/// roundings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ideal {
    pub(crate) products: usize,
    pub(crate) scores: usize,
}

impl Ideal {
    pub(crate) fn new(channels: usize, block: usize) -> Self {
        Ideal { products: channels / 16 + block / 16, scores: block / 2 }
    }

    pub(crate) fn instructions(&self) -> usize {
        self.products + 4 * self.scores + self.scores / 2
    }
}

/// Of one entry.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Figures {
    pub(crate) entry: String,
    /// Channels of K, of V; tokens of a block.
    pub(crate) channels: (usize, usize),
    pub(crate) block: usize,
    pub(crate) ideal: Ideal,
    /// Of the shortest way round the main loop.
    pub(crate) instructions: usize,
    pub(crate) products: usize,
    pub(crate) exponentials: usize,
    pub(crate) multiply_adds: usize,
    pub(crate) maxima: usize,
    pub(crate) moves: usize,
    pub(crate) overlaps: bool,
    pub(crate) spills: bool,
    /// Highest registers of producer and consumer, and the plan's.
    pub(crate) registers: (u32, u32),
    pub(crate) plan: (u32, u32),
}

impl Figures {
    pub(crate) fn new(
        entry: &str,
        channels: (usize, usize),
        block: usize,
        code: &Code,
        round: &Loop,
    ) -> Self {
        Figures {
            entry: entry.to_string(),
            channels,
            block,
            ideal: Ideal::new(channels.0, block),
            instructions: round.instructions,
            products: round.count("HGMMA"),
            exponentials: round.count("MUFU"),
            multiply_adds: round.count("FFMA"),
            maxima: round.count("FMNMX"),
            moves: round.moves,
            overlaps: round.overlaps,
            spills: code.spills(),
            registers: code.registers_of_roles().unwrap_or_default(),
            plan: SM90_REGISTERS,
        }
    }

    /// Cycles of an SM for a block of 128 rows: of the tensor cores, of the exponential units, and of issuing the two
    /// consumers' instructions, one a cycle in each of the SM's four parts.
    pub(crate) fn cycles(&self) -> (u32, u32, u32) {
        let scores = 128 * self.block as u32;
        let tensor = 2 * scores * (self.channels.0 + self.channels.1) as u32 / FLOP_PER_CYCLE;
        (tensor, scores / EXP_PER_CYCLE, 2 * self.instructions as u32)
    }
}

/// The tile that an entry is for, by its name.
fn tile_of(entry: &str) -> Option<PrefillTile> {
    PREFILL_SM90.into_iter().find(|t| t.entries.as_flattened().contains(&entry))
}

/// Figures of all Hopper prefill entries.
pub(crate) fn figures(
    tools: &Tools,
    manifest: &Manifest,
    files: &BTreeMap<String, String>,
    scratch: &Path,
) -> Result<Vec<Figures>, String> {
    let mut all = Vec::new();
    for (file, text) in files.iter().filter(|f| f.0.starts_with("prefill") && f.0.ends_with("_sm_90a.ptx")) {
        let assembled = tools.assemble(file, text, "sm_90a", scratch)?;
        let code = tools.disassemble(&assembled)?;
        for entry in manifest.entries.iter().filter(|e| e.file_name() == *file) {
            let Some(tile) = tile_of(&entry.name) else { continue };
            let (channels, block) = ((tile.head_dim, tile.v_head_dim), tile.block);
            let code = code.get(&entry.name).ok_or_else(|| format!("{} is not in {file}", entry.name))?;
            let round = code.main_loop().ok_or_else(|| format!("{} has no loop", entry.name))?;
            all.push(Figures::new(&entry.name, channels, block, code, &round));
        }
    }
    Ok(all)
}

/// The table: how it is written, and read again.
pub(crate) fn table(all: &[Figures], version: &str) -> String {
    let mut text = format!(
        "Hopper prefill: a block of KV, one lane of a consumer; in brackets the least that could do it.\n\
         Cycles are an SM's for 128 rows: tensor cores at {FLOP_PER_CYCLE} operations, exponentials at {EXP_PER_CYCLE}, \
         one instruction a cycle in each quarter.\n\
         {version}\n\n\
         {:32} {:>9} {:>5} {:>11} {:>9} {:>9} {:>9} {:>9} {:>5} {:>9} {:>20}\n",
        "entry",
        "channels",
        "block",
        "instr",
        "HGMMA",
        "MUFU",
        "FFMA",
        "FMNMX",
        "moves",
        "registers",
        "tensor/exp/issue"
    );
    for f in all {
        let pair = |n: usize, ideal: usize| format!("{n} ({ideal})");
        let (tensor, exp, issue) = f.cycles();
        let _ = writeln!(
            text,
            "{:32} {:>9} {:>5} {:>11} {:>9} {:>9} {:>9} {:>9} {:>5} {:>9} {:>20}",
            f.entry,
            format!("{}/{}", f.channels.0, f.channels.1),
            f.block,
            pair(f.instructions, f.ideal.instructions()),
            pair(f.products, f.ideal.products),
            pair(f.exponentials, f.ideal.scores),
            pair(f.multiply_adds, f.ideal.scores),
            pair(f.maxima, f.ideal.scores),
            f.moves,
            format!("{}/{}", f.registers.0, f.registers.1),
            format!("{tensor}/{exp}/{issue}"),
        );
    }
    // The tiles of FlashAttention-3 (arXiv:2407.08608 and its tile_size.h), at the same least counts.
    let _ = writeln!(text, "\nFlashAttention-3's tiles at the least counts, rows x tokens:");
    for (rows, channels, block) in
        [(192, 64, 128), (192, 64, 192), (128, 128, 128), (128, 128, 176), (128, 192, 112), (128, 256, 80)]
    {
        let ideal = Ideal::new(channels, block);
        let scores = rows as u32 * block as u32;
        let _ = writeln!(
            text,
            "{rows} x {block}, {channels} channels: {} instructions, {} HGMMA, {} exponentials; tensor/exp/issue {}/{}/{}",
            ideal.instructions(),
            ideal.products,
            ideal.scores,
            2 * scores * 2 * channels as u32 / FLOP_PER_CYCLE,
            scores / EXP_PER_CYCLE,
            rows as u32 / 64 * ideal.instructions() as u32,
        );
    }
    text
}

/// Version and figures that can be compared, from [`table`].
pub(crate) fn parse(text: &str) -> (String, Vec<Figures>) {
    let version = text.lines().find(|l| l.contains("release")).unwrap_or_default().to_string();
    let rows = text.lines().filter(|l| l.starts_with("prefill_sm90"));
    let figures = rows.map(|row| {
        let words: Vec<&str> = row.split_whitespace().filter(|w| !w.starts_with('(')).collect();
        let number = |i: usize| words.get(i).and_then(|w| w.parse().ok()).unwrap_or(0);
        Figures {
            entry: words.first().map(|w| w.to_string()).unwrap_or_default(),
            instructions: number(3),
            products: number(4),
            exponentials: number(5),
            multiply_adds: number(6),
            maxima: number(7),
            moves: number(8),
            ..Figures::default()
        }
    });
    (version, figures.collect())
}
