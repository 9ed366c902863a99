//! What NVIDIA's assembler makes of a PTX file: registers, stack, warnings, and the instructions of each main loop. Shared
//! by the tests and the examples; plain std, no dependencies.
#![allow(dead_code)] // each user takes a part

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// NVIDIA's `ptxas` and `nvdisasm`, where they are installed.
pub(crate) struct Tools {
    ptxas: PathBuf,
    nvdisasm: PathBuf,
    /// What ptxas says of itself.
    help: String,
    /// The version's line.
    pub(crate) version: String,
}

/// What ptxas says of one entry.
#[derive(Clone, Debug, Default)]
pub(crate) struct Resources {
    pub(crate) stack: u32,
    pub(crate) spills: u32,
    pub(crate) registers: u32,
}

/// A file, assembled for one architecture.
pub(crate) struct Assembled {
    pub(crate) entries: BTreeMap<String, Resources>,
    /// Lines that tell of `wgmma` serialised or waits injected (C7510 to C7519), or of registers not as asked for.
    pub(crate) complaints: Vec<String>,
    cubin: PathBuf,
}

/// A tool of the CUDA toolkit: `FERROFLASH_CUDA_BIN`, the path, or NVIDIA's Python packages.
fn find(name: &str) -> Option<PathBuf> {
    let mut places: Vec<PathBuf> =
        env::var_os("FERROFLASH_CUDA_BIN").map(PathBuf::from).into_iter().collect();
    places.extend(env::split_paths(&env::var_os("PATH")?));
    let script = "import nvidia; print(*nvidia.__path__, sep='\\n')";
    if let Ok(out) = Command::new("python3").args(["-c", script]).output() {
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        places.extend(text.lines().map(|l| Path::new(l).join("cu13/bin")));
    }
    places.into_iter().map(|p| p.join(name)).find(|p| p.is_file())
}

impl Tools {
    /// `None` says what is missing.
    pub(crate) fn find() -> Option<Self> {
        let found = find("ptxas").zip(find("nvdisasm"));
        let Some((ptxas, nvdisasm)) = found else {
            println!("skipped: no ptxas or nvdisasm (pip install nvidia-cuda-nvcc nvidia-cuda-nvdisasm)");
            return None;
        };
        let ask = |what: &str| {
            let out = Command::new(&ptxas).arg(what).output().ok()?;
            Some(String::from_utf8_lossy(&out.stdout).into_owned())
        };
        let (help, version) = (ask("--help")?, ask("--version")?);
        let version = version.lines().find(|l| l.contains("release")).unwrap_or_default().to_string();
        Some(Tools { ptxas, nvdisasm, help, version })
    }

    pub(crate) fn knows(&self, architecture: &str) -> bool {
        self.help.contains(architecture)
    }

    /// Assembles `text`; `scratch` keeps the files. The error is the assembler's.
    pub(crate) fn assemble(
        &self,
        name: &str,
        text: &str,
        architecture: &str,
        scratch: &Path,
    ) -> Result<Assembled, String> {
        let ptx = scratch.join(name);
        let cubin = scratch.join(format!("{name}.{architecture}.cubin"));
        fs::write(&ptx, text).map_err(|e| e.to_string())?;
        let mut command = Command::new(&self.ptxas);
        command.arg(format!("-arch={architecture}")).arg("-v").arg(&ptx).arg("-o").arg(&cubin);
        let out = command.output().map_err(|e| e.to_string())?;
        let report = String::from_utf8_lossy(&out.stderr).into_owned();
        if !out.status.success() {
            return Err(report);
        }
        let complains = |line: &&str| line.contains("(C75") || line.contains("warning");
        let complaints = report.lines().filter(complains).map(str::to_string).collect();
        Ok(Assembled { entries: resources(&report), complaints, cubin })
    }

    /// The instructions of every entry.
    pub(crate) fn disassemble(&self, assembled: &Assembled) -> Result<BTreeMap<String, Code>, String> {
        let out = Command::new(&self.nvdisasm).arg("-c").arg(&assembled.cubin).output();
        let text = String::from_utf8_lossy(&out.map_err(|e| e.to_string())?.stdout).into_owned();
        let sections = text.split(".section\t.text.").skip(1);
        Ok(sections
            .map(|section| {
                let name = section.split(',').next().unwrap_or_default().trim().to_string();
                (name, Code::parse(section))
            })
            .collect())
    }
}

/// Reads `ptxas -v`.
fn resources(report: &str) -> BTreeMap<String, Resources> {
    let mut all = BTreeMap::new();
    let (mut current, mut entry) = (None, Resources::default());
    let number_before = |line: &str, what: &str| -> u32 {
        let before = line.find(what).map_or("", |at| &line[..at]);
        before.split_whitespace().next_back().and_then(|n| n.parse().ok()).unwrap_or(u32::MAX)
    };
    for line in report.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            current = rest.split('\'').next().map(str::to_string);
        } else if line.contains("bytes stack frame") {
            entry.stack = number_before(line, " bytes stack frame");
            entry.spills =
                number_before(line, " bytes spill stores") + number_before(line, " bytes spill loads");
        } else if line.contains(" registers") {
            entry.registers = number_before(line, " registers");
            if let Some(name) = current.take() {
                all.insert(name, std::mem::take(&mut entry));
            }
        }
    }
    all
}

/// An entry's machine code.
pub(crate) struct Code {
    instructions: Vec<Instruction>,
}

struct Instruction {
    /// Without the predicate.
    text: String,
    predicated: bool,
    /// Where it may jump.
    target: Option<usize>,
}

impl Instruction {
    fn name(&self) -> &str {
        self.text.split([' ', '.']).next().unwrap_or_default()
    }

    /// A move of a register or constant, whatever unit does it.
    fn is_move(&self) -> bool {
        ["MOV", "IMAD.MOV", "CS2R", "IMAD.U32 R"].iter().any(|m| self.text.starts_with(m))
            && !self.text.starts_with("IMAD.MOV.U32.")
    }
}

/// The shortest way round a loop: what an iteration does in which nothing special happens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Loop {
    /// Instructions of the loop, and of the shortest way round it.
    pub(crate) whole: usize,
    pub(crate) instructions: usize,
    /// Of the way round, by name.
    names: BTreeMap<String, usize>,
    pub(crate) moves: usize,
    /// Whether the last exponential comes before the wait for the products that it should run beside.
    pub(crate) overlaps: bool,
    /// Instructions in the order of the way round, for looking at.
    pub(crate) texts: Vec<String>,
}

impl Loop {
    /// Instructions whose name is `name`, or, with dots, whose text begins so.
    pub(crate) fn count(&self, name: &str) -> usize {
        if name.contains('.') {
            return self.texts.iter().filter(|t| t.starts_with(name)).count();
        }
        self.names.get(name).copied().unwrap_or(0)
    }
}

impl Code {
    fn parse(section: &str) -> Self {
        let (mut labels, mut lines) = (BTreeMap::new(), Vec::new());
        for line in section.lines() {
            if let Some(label) = line.strip_suffix(':').filter(|l| l.starts_with(".L_")) {
                labels.insert(label.to_string(), lines.len());
            } else if line.trim().starts_with("/*")
                && let Some(rest) = line.split("*/").nth(1)
            {
                let text = rest.split("(*").next().unwrap_or_default();
                lines.push(text.trim().trim_end_matches(';').trim().to_string());
            }
        }
        let instructions = lines
            .into_iter()
            .map(|line| {
                let predicated = line.starts_with('@');
                let text = if predicated { line.split_once(' ').map_or("", |l| l.1) } else { &line };
                let label = text.split("`(").nth(1).and_then(|t| t.split(')').next());
                let target = label.and_then(|l| labels.get(l)).copied();
                let branches = text.starts_with("BRA");
                // `BRA P0, target` and `BRA UP0, target` are predicated too.
                let predicated = predicated || branches && text.contains('P') && text.contains(',');
                Instruction { text: text.to_string(), predicated, target: target.filter(|_| branches) }
            })
            .collect();
        Code { instructions }
    }

    fn successors(&self, at: usize) -> impl Iterator<Item = usize> {
        let i = &self.instructions[at];
        let ends = i.target.is_some() || i.text.starts_with("EXIT");
        let next = (i.predicated || !ends).then_some(at + 1);
        i.target.into_iter().chain(next.filter(|&n| n < self.instructions.len()))
    }

    /// Every instruction's operation, with what its dots say.
    pub(crate) fn operations(&self) -> impl Iterator<Item = &str> {
        self.instructions.iter().map(|i| i.text.split(' ').next().unwrap_or_default())
    }

    /// Whether there are instructions on local memory.
    pub(crate) fn spills(&self) -> bool {
        self.instructions.iter().any(|i| matches!(i.name(), "LDL" | "STL"))
    }

    /// Number of the highest register, and one, before and after the code takes more registers (`setmaxnreg.inc`): of a
    /// producer, and of consumers. `None` where it takes none.
    pub(crate) fn registers_of_roles(&self) -> Option<(u32, u32)> {
        let down = self.instructions.iter().position(|i| i.text.starts_with("USETMAXREG.DEALLOC"))?;
        let up = self.instructions.iter().position(|i| i.text.starts_with("USETMAXREG.TRY_ALLOC"))?;
        let highest = |range: &[Instruction]| {
            let words = range.iter().flat_map(|i| i.text.split(|c: char| !c.is_ascii_alphanumeric()));
            let numbers = words.filter_map(|w| w.strip_prefix('R')?.parse::<u32>().ok());
            numbers.max().map_or(0, |n| n + 1)
        };
        // The other branch may lie on either side; each role is one stretch of code.
        (down < up).then(|| (highest(&self.instructions[down..up]), highest(&self.instructions[up..])))
    }

    /// The loop whose iterations have the most tensor-core products (`HMMA`, `HGMMA`), of those with as many the
    /// shortest.
    pub(crate) fn main_loop(&self) -> Option<Loop> {
        let products = |range: std::ops::RangeInclusive<usize>| {
            self.instructions[range].iter().filter(|i| matches!(i.name(), "HMMA" | "HGMMA")).count()
        };
        let mut best: Option<(usize, Loop)> = None;
        for end in 0..self.instructions.len() {
            let Some(start) = self.instructions[end].target.filter(|&t| t <= end) else { continue };
            if products(start..=end) == 0 {
                continue;
            }
            let Some(round) = self.shortest_way(start, end) else { continue };
            let found = round.count("HMMA") + round.count("HGMMA");
            let better = match &best {
                None => found > 0,
                // An outer loop has the inner one's products and its own.
                Some((n, b)) => round.whole < b.whole && 2 * found > *n || found > 2 * n,
            };
            if better {
                best = Some((found, round));
            }
        }
        best.map(|b| b.1)
    }

    fn shortest_way(&self, start: usize, end: usize) -> Option<Loop> {
        let mut steps = vec![(usize::MAX, 0); end - start + 1];
        steps[0].0 = 0;
        for at in start..end {
            let (length, _) = steps[at - start];
            if length == usize::MAX {
                continue;
            }
            for next in self.successors(at).filter(|&n| n > at && n <= end) {
                if length + 1 < steps[next - start].0 {
                    steps[next - start] = (length + 1, at);
                }
            }
        }
        let mut way = vec![end];
        while let Some(&at) = way.last().filter(|&&at| at != start) {
            let (length, from) = steps[at - start];
            if length == usize::MAX {
                return None;
            }
            way.push(from);
        }
        way.reverse();
        let way: Vec<&Instruction> = way.into_iter().map(|i| &self.instructions[i]).collect();
        let mut names = BTreeMap::new();
        way.iter().for_each(|i| *names.entry(i.name().to_string()).or_default() += 1);
        let last = |begin: &str| way.iter().rposition(|i| i.text.starts_with(begin));
        Some(Loop {
            whole: end - start + 1,
            instructions: way.len(),
            names,
            moves: way.iter().filter(|i| i.is_move()).count(),
            overlaps: last("MUFU.EX2") < last("WARPGROUP.DEPBAR"),
            texts: way.iter().map(|i| i.text.clone()).collect(),
        })
    }
}
