//! The committed PTX is what the sources give, and assembles for every GPU without spills. Needs a compiler with the
//! standard library's sources, and NVIDIA's `ptxas` and `nvdisasm` (`pip install nvidia-cuda-nvcc
//! nvidia-cuda-nvdisasm`); without them it says what it skips.

#[path = "../ptx/compile.rs"]
mod compile;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs, thread};

use compile::{Manifest, Toolchain};

const ARCHITECTURES: [&str; 6] = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"];

/// Registers of an SM.
const REGISTERS: u32 = 65536;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn manifest() -> Manifest {
    Manifest::parse(&fs::read_to_string(root().join("ptx/manifest.toml")).unwrap()).unwrap()
}

/// A tool of the CUDA toolkit: `FERROFLASH_CUDA_BIN`, the path, or NVIDIA's Python packages.
fn tool(name: &str) -> Option<PathBuf> {
    let mut places: Vec<PathBuf> =
        env::var_os("FERROFLASH_CUDA_BIN").map(PathBuf::from).into_iter().collect();
    places.extend(env::split_paths(&env::var_os("PATH")?));
    let script = "import nvidia; print(*nvidia.__path__, sep='\\n')";
    if let Ok(out) = Command::new("python3").args(["-c", script]).output() {
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        places.extend(text.lines().map(|l| Path::new(l).join("cu13/bin")));
    }
    let found = places.into_iter().map(|p| p.join(name)).find(|p| p.is_file());
    if found.is_none() {
        println!("skipped: no {name} (pip install nvidia-cuda-nvcc nvidia-cuda-nvdisasm)");
    }
    found
}

#[test]
fn the_manifest_is_of_these_sources() {
    let source = compile::source_hash(&root().join("kernels-gpu")).unwrap();
    assert_eq!(manifest().source, source, "run `cargo run --example write_ptx` and commit ptx/");
}

#[test]
fn the_manifest_is_the_table_of_entries() {
    let table: Vec<compile::Entry> = ferroflash_kernels::kernels::ENTRIES
        .iter()
        .map(|e| compile::Entry {
            name: e.name.into(),
            family: e.family.into(),
            threads: e.threads,
            min_ctas: e.min_ctas,
            shared_bytes: e.shared_bytes,
            params_bytes: e.params_bytes,
        })
        .collect();
    assert_eq!(manifest().entries, table);
    // What every GPU from Ampere on can give a CTA.
    table.iter().for_each(|e| assert!(e.shared_bytes <= 99 << 10, "{}", e.name));
}

#[test]
fn the_sources_give_the_committed_ptx() {
    let toolchain = match Toolchain::find() {
        Ok(toolchain) => toolchain,
        Err(why) => return println!("skipped: {why}"),
    };
    let ptx = toolchain.compile(&root().join("kernels-gpu"), &root().join("target/nvptx")).unwrap();
    let committed = manifest();
    assert_eq!(ptx.manifest.entries, committed.entries);
    if ptx.manifest.compiler != committed.compiler {
        // Another compiler gives another text; it must stand the same checks.
        println!(
            "{} is not the manifest's {}: the text is not compared",
            toolchain.version, committed.compiler
        );
        return assemble(&ptx.files, &ptx.manifest);
    }
    for (name, text) in &ptx.files {
        let stands = fs::read_to_string(root().join("ptx").join(name)).unwrap();
        assert!(stands == *text, "ptx/{name} is not what the sources give: `cargo run --example write_ptx`");
    }
}

#[test]
fn every_entry_assembles_for_every_gpu_without_spills() {
    let manifest = manifest();
    let names = manifest.entries.iter().map(|e| compile::file_name(&e.family));
    let read = |name: String| {
        let text = fs::read_to_string(root().join("ptx").join(&name)).unwrap();
        (name, text)
    };
    assemble(&names.map(read).collect(), &manifest);
}

/// What ptxas says of one entry.
struct Resources {
    stack: u32,
    spills: u32,
    registers: u32,
}

/// Runs ptxas over all files and checks every entry.
fn assemble(files: &BTreeMap<String, String>, manifest: &Manifest) {
    let Some(ptxas) = tool("ptxas") else { return };
    let nvdisasm = tool("nvdisasm");
    let known = String::from_utf8(Command::new(&ptxas).arg("--help").output().unwrap().stdout).unwrap();
    let scratch = root().join("target/ptx-checks");
    fs::create_dir_all(&scratch).unwrap();
    let job = Job { ptxas, nvdisasm, known, scratch, manifest };
    let files: Vec<(&String, &String)> = files.iter().collect();
    let (next, rows) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, |n| n.get()) {
            scope.spawn(|| {
                while let Some((name, text)) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let table = job.check(name, text);
                    rows.lock().unwrap().insert(name.to_string(), table);
                }
            });
        }
    });
    println!("{:28} {:>5} {:>6} {:>7}  main loop (sm_80)", "entry", "regs", "shared", "threads");
    rows.into_inner().unwrap().values().for_each(|table| print!("{table}"));
}

struct Job<'a> {
    ptxas: PathBuf,
    nvdisasm: Option<PathBuf>,
    /// What ptxas says of itself.
    known: String,
    scratch: PathBuf,
    manifest: &'a Manifest,
}

impl Job<'_> {
    /// Assembles a file for every GPU; gives the table's rows.
    fn check(&self, name: &str, text: &str) -> String {
        assert!(!text.contains(".extern .func"), "{name} calls a function that is not there");
        let ptx = self.scratch.join(name);
        fs::write(&ptx, text).unwrap();
        let mut table = String::new();
        for architecture in ARCHITECTURES {
            if !self.known.contains(architecture) {
                println!("skipped: this ptxas does not know {architecture}");
                continue;
            }
            let cubin = self.scratch.join(format!("{name}.{architecture}.cubin"));
            let arch = format!("-arch={architecture}");
            let mut command = Command::new(&self.ptxas);
            let out = command.arg(arch).arg("-v").arg(&ptx).arg("-o").arg(&cubin).output().unwrap();
            let report = String::from_utf8_lossy(&out.stderr).into_owned();
            assert!(out.status.success(), "{name} for {architecture}:\n{report}");
            let loops = match &self.nvdisasm {
                Some(nvdisasm) if architecture == "sm_80" => main_loops(nvdisasm, &cubin),
                _ => BTreeMap::new(),
            };
            let all = resources(&report);
            for entry in self.manifest.entries.iter().filter(|e| compile::file_name(&e.family) == *name) {
                let compile::Entry { name, threads, shared_bytes, min_ctas, .. } = entry;
                let r = &all[name];
                assert_eq!((r.stack, r.spills), (0, 0), "stack and spills of {name} for {architecture}");
                let most = (REGISTERS / (threads * min_ctas)).min(255);
                assert!(r.registers <= most, "{name} uses {} registers of {most}", r.registers);
                if architecture == "sm_80" {
                    let mix = loops.get(name).map_or("", String::as_str);
                    let registers = r.registers;
                    table += &format!("{name:28} {registers:>5} {shared_bytes:>6} {threads:>7}  {mix}\n");
                }
            }
        }
        table
    }
}

/// Reads `ptxas -v`.
fn resources(report: &str) -> BTreeMap<String, Resources> {
    let mut all = BTreeMap::new();
    let mut current = None;
    let number_before = |line: &str, what: &str| -> u32 {
        let before = &line[..line.find(what).unwrap_or_else(|| panic!("{what} in {line}"))];
        before.split_whitespace().next_back().unwrap().parse().unwrap()
    };
    let (mut stack, mut spills) = (0, 0);
    for line in report.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            current = rest.split('\'').next().map(str::to_string);
        } else if line.contains("bytes stack frame") {
            stack = number_before(line, " bytes stack frame");
            spills = number_before(line, " bytes spill stores") + number_before(line, " bytes spill loads");
        } else if line.contains(" registers") {
            let registers = number_before(line, " registers");
            all.insert(current.take().unwrap(), Resources { stack, spills, registers });
        }
    }
    all
}

/// What is counted: a name, and how its instructions begin.
const COUNTED: [(&str, &[&str]); 9] = [
    ("HMMA", &["HMMA"]),
    ("MUFU", &["MUFU"]),
    ("LDSM", &["LDSM"]),
    ("LDGSTS", &["LDGSTS"]),
    ("LDG.128", &["LDG.E.128"]),
    ("LDG.64", &["LDG.E.64"]),
    ("LDG", &["LDG"]),
    ("LDS", &["LDS"]),
    ("STS", &["STS"]),
];

/// The instruction mix of each entry's longest loop with products in it, or of the whole entry.
fn main_loops(nvdisasm: &Path, cubin: &Path) -> BTreeMap<String, String> {
    let out = Command::new(nvdisasm).arg("-c").arg(cubin).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let mut mixes = BTreeMap::new();
    for section in text.split(".section\t.text.").skip(1) {
        let name = section.split(',').next().unwrap().trim().to_string();
        let (mut labels, mut code, mut jumps) = (BTreeMap::new(), Vec::new(), Vec::new());
        for line in section.lines() {
            if let Some(label) = line.strip_suffix(':').filter(|l| l.starts_with(".L_")) {
                labels.insert(label.to_string(), code.len());
            } else if let Some(rest) = line.split("*/").nth(1).filter(|_| line.trim().starts_with("/*")) {
                let instruction =
                    rest.trim().trim_start_matches(|c| c != ' ' && rest.trim().starts_with('@'));
                let instruction = instruction.trim().trim_end_matches(';').to_string();
                if let Some(target) = instruction.split("`(").nth(1).and_then(|t| t.split(')').next()) {
                    jumps.push((code.len(), target.to_string()));
                }
                code.push(instruction);
            }
        }
        let count = |range: std::ops::Range<usize>, begin: &str| {
            code[range].iter().filter(|i| i.starts_with(begin)).count()
        };
        let loops = jumps.iter().filter_map(|(at, target)| {
            let start = *labels.get(target)?;
            (start < *at && count(start..*at, "HMMA") > 0).then_some(start..*at + 1)
        });
        let range = loops.max_by_key(|r| r.len()).unwrap_or(0..code.len());
        let mut mix = format!("{} instructions", range.len());
        for (name, begins) in COUNTED {
            let n: usize = begins.iter().map(|b| count(range.clone(), b)).sum();
            if n > 0 {
                mix += &format!(", {n} {name}");
            }
        }
        mixes.insert(name, mix);
    }
    mixes
}
