//! The committed PTX is what the sources give, and assembles for every GPU without spills; Hopper's main loops are no
//! longer than they were. Needs a compiler with the standard library's sources, and NVIDIA's `ptxas` and `nvdisasm` (`pip
//! install nvidia-cuda-nvcc nvidia-cuda-nvdisasm`); without them it says what it skips.

#[path = "../ptx/assemble.rs"]
mod assemble;
#[path = "../ptx/compile.rs"]
mod compile;
#[path = "../ptx/report.rs"]
mod report;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{fs, thread};

use assemble::{Loop, Tools};
use compile::{Entry, Manifest, Toolchain};
use ferroflash_kernels::abi::SM90_REGISTERS;
use report::Figures;

/// For each instruction set of the PTX, the GPUs that it is for.
const ARCHITECTURES: [(&str, &[&str]); 2] =
    [("sm_80", &["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]), ("sm_90a", &["sm_90a"])];

/// Bytes that an SM of an H200 should have on their way: 4.8 TB/s (NVIDIA's data sheet) over 132 SMs; a latency of 1 us
/// under load is assumed.
const NEEDED: f64 = 4.8e12 / 132.0 * 1e-6;

/// Registers of an SM.
const REGISTERS: u32 = 65536;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn manifest() -> Manifest {
    Manifest::parse(&fs::read_to_string(root().join("ptx/manifest.toml")).unwrap()).unwrap()
}

/// The committed files.
fn committed() -> BTreeMap<String, String> {
    let names = manifest().entries.iter().map(Entry::file_name).collect::<Vec<_>>();
    names
        .into_iter()
        .map(|name| (name.clone(), fs::read_to_string(root().join("ptx").join(name)).unwrap()))
        .collect()
}

#[test]
fn the_manifest_is_of_these_sources() {
    let source = compile::source_hash(&root().join("kernels-gpu")).unwrap();
    assert_eq!(manifest().source, source, "run `cargo run --example write_ptx` and commit ptx/");
}

#[test]
fn the_manifest_is_the_table_of_entries() {
    let table: Vec<Entry> = ferroflash_kernels::kernels::ENTRIES
        .iter()
        .map(|e| Entry {
            name: e.name.into(),
            family: e.family.into(),
            target: e.target.into(),
            threads: e.threads,
            min_ctas: e.min_ctas,
            shared_bytes: e.shared_bytes,
            params_bytes: e.params_bytes,
            cluster: e.cluster,
        })
        .collect();
    assert_eq!(manifest().entries, table);
    for e in &table {
        // What every GPU from Ampere on, and Hopper, can give a CTA; large variants are chosen where there is an A100's.
        let most = match e.target.as_str() {
            "sm_80" if e.name.ends_with("_large") => 163 << 10,
            "sm_80" => 99 << 10,
            _ => 227 << 10,
        };
        assert!(e.shared_bytes <= most, "{}", e.name);
    }
}

#[test]
fn the_sources_give_the_committed_ptx() {
    let toolchain = match Toolchain::find() {
        Ok(toolchain) => toolchain,
        Err(why) => return println!("skipped: {why}"),
    };
    let ptx = toolchain.compile(&root().join("kernels-gpu"), &root().join("target/nvptx"), "").unwrap();
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
    assemble(&committed(), &manifest());
}

/// Runs ptxas over all files and checks every entry.
fn assemble(files: &BTreeMap<String, String>, manifest: &Manifest) {
    let Some(tools) = Tools::find() else { return };
    let scratch = root().join("target/ptx-checks");
    fs::create_dir_all(&scratch).unwrap();
    let files: Vec<(&String, &String)> = files.iter().collect();
    let (next, rows) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, |n| n.get()) {
            scope.spawn(|| {
                while let Some((name, text)) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let table = check(&tools, &scratch, manifest, name, text);
                    rows.lock().unwrap().insert(name.to_string(), table);
                }
            });
        }
    });
    println!("{:32} {:>5} {:>6} {:>7}  main loop", "entry", "regs", "shared", "threads");
    rows.into_inner().unwrap().values().for_each(|table| print!("{table}"));
}

/// Assembles a file for every GPU that it is for; gives the table's rows.
fn check(tools: &Tools, scratch: &Path, manifest: &Manifest, file: &str, text: &str) -> String {
    assert!(!text.contains(".extern .func"), "{file} calls a function that is not there");
    let entries: Vec<&Entry> = manifest.entries.iter().filter(|e| e.file_name() == *file).collect();
    let target = entries[0].target.as_str();
    let architectures = ARCHITECTURES.iter().find(|a| a.0 == target).unwrap().1;
    let mut table = String::new();
    for &architecture in architectures {
        if !tools.knows(architecture) {
            println!("skipped: this ptxas does not know {architecture}");
            continue;
        }
        let assembled = tools.assemble(file, text, architecture, scratch).unwrap();
        assert!(assembled.complaints.is_empty(), "{file} for {architecture}: {:?}", assembled.complaints);
        let shown = architecture == target;
        let code = if shown { tools.disassemble(&assembled).unwrap() } else { BTreeMap::new() };
        for Entry { name, threads, shared_bytes, min_ctas, .. } in entries.iter().copied() {
            let r = &assembled.entries[name];
            assert_eq!((r.stack, r.spills), (0, 0), "stack and spills of {name} for {architecture}");
            let most = (REGISTERS / (threads * min_ctas)).min(255);
            assert!(r.registers <= most, "{name} uses {} registers of {most}", r.registers);
            if shown {
                let mix = code[name].main_loop().map(|l| mix(&l)).unwrap_or_default();
                table += &format!("{name:32} {:>5} {shared_bytes:>6} {threads:>7}  {mix}\n", r.registers);
            }
        }
    }
    table
}

/// What is counted of a main loop.
const COUNTED: [&str; 9] = ["HMMA", "HGMMA", "MUFU", "LDSM", "LDGSTS", "LDG.E.128", "LDG", "LDS", "STS"];

fn mix(round: &Loop) -> String {
    let counts = COUNTED.iter().map(|name| (name, round.count(name))).filter(|c| c.1 > 0);
    let counts: Vec<String> = counts.map(|(name, n)| format!("{n} {name}")).collect();
    format!("{} instructions: {}", round.instructions, counts.join(", "))
}

/// Decoding copies 16 bytes at a time, and keeps more of them on their way than an SM needs to hide the memory's latency.
#[test]
fn decoding_keeps_the_memory_busy() {
    use ferroflash_kernels::abi::{DECODE_QUANTIZED_SLOTS, DECODE_SLOTS, DECODE_WARPS};
    let Some(tools) = Tools::find() else { return };
    let scratch = root().join("target/decode-checks");
    fs::create_dir_all(&scratch).unwrap();
    let (manifest, files) = (manifest(), committed());
    // 16 tokens of 16 bits are the bytes of 32 of 8, the least of quantised stages.
    let kinds = [("", &DECODE_SLOTS[..]), ("quantized_", &DECODE_QUANTIZED_SLOTS[..])];
    for (kind, &(head_dim, slots)) in
        kinds.iter().flat_map(|(kind, slots)| slots.iter().map(move |s| (kind, s)))
    {
        let file = format!("decode_{kind}d{head_dim}_sm_80.ptx");
        let assembled = tools.assemble(&file, &files[&file], "sm_90", &scratch).unwrap();
        for entry in manifest.entries.iter().filter(|e| e.file_name() == file) {
            let registers = assembled.entries[&entry.name].registers;
            // 65536 registers, 228 KiB of shared memory, of which each CTA has 1 KiB more.
            let ctas = (REGISTERS / (entry.threads * registers.next_multiple_of(8)))
                .min((228 << 10) / (entry.shared_bytes + 1024));
            let flight = ctas as usize * DECODE_WARPS * (slots - 1) * 16 * 2 * head_dim;
            println!("{:20} {ctas} CTAs an SM, {flight} bytes on their way, {NEEDED:.0} needed", entry.name);
            assert!(flight as f64 >= NEEDED, "{}", entry.name);
        }
        for (name, code) in tools.disassemble(&assembled).unwrap() {
            let copies = code.operations().filter(|op| op.starts_with("LDGSTS")).collect::<Vec<_>>();
            assert!(!copies.is_empty(), "{name}");
            assert!(copies.iter().all(|op| op.contains(".128")), "{name}: {copies:?}");
        }
    }
}

/// So does latent attention. Of a block Hopper's scorer has 36 products for 576 channels and 4 for 64 tokens, its helper 4,
/// and both live with the registers that they take.
#[test]
fn latent_attention_keeps_memory_and_tensor_cores_busy() {
    let Some(tools) = Tools::find() else { return };
    let scratch = root().join("target/mla-checks");
    fs::create_dir_all(&scratch).unwrap();
    let row = 2 * 576;
    // Ampere's with an A100's shared memory: of seven stages of 16 rows four are a block in use. Hopper's: of each part of
    // a block one is in use, one on its way.
    for (target, flight) in [("sm_80", 3 * 16 * row), ("sm_90a", 64 * row)] {
        let file = format!("decode_mla_{target}.ptx");
        let assembled = tools.assemble(&file, &committed()[&file], target, &scratch).unwrap();
        println!("{file}: {flight} bytes on their way, {NEEDED:.0} needed");
        assert!(flight as f64 >= NEEDED);
        for (name, code) in tools.disassemble(&assembled).unwrap() {
            let copies = code.operations().filter(|op| op.starts_with("LDGSTS")).collect::<Vec<_>>();
            assert!(!copies.is_empty() && copies.iter().all(|op| op.contains(".128")), "{name}: {copies:?}");
            if target == "sm_80" {
                continue;
            }
            let products = code.operations().filter(|op| op.starts_with("HGMMA")).count();
            assert_eq!(products, 36 + 4 + 4, "{name}");
            assert!(!code.spills(), "{name}: local memory");
            let registers = code.registers_of_roles().unwrap();
            println!("{name}: registers of producer and consumers {registers:?}");
            assert!(
                registers.0 <= SM90_REGISTERS.0 && registers.1 <= SM90_REGISTERS.1,
                "{name}: {registers:?}"
            );
        }
    }
}

/// The committed table `ptx/sass_sm_90a.txt` is what the committed PTX gives, or better; nothing in a main loop is
/// waste that we know of.
#[test]
fn hoppers_main_loops_get_no_worse() {
    let Some(tools) = Tools::find() else { return };
    let scratch = root().join("target/sass-checks");
    fs::create_dir_all(&scratch).unwrap();
    let now = report::figures(&tools, &manifest(), &committed(), &scratch).unwrap();
    let text = fs::read_to_string(root().join("ptx/sass_sm_90a.txt")).unwrap();
    print!("{}", report::table(&now, &tools.version));
    for f in &now {
        // Whatever the assembler's version.
        let name = &f.entry;
        assert_eq!(f.products, f.ideal.products, "{name}: wgmma a block");
        assert!(f.overlaps, "{name}: the softmax runs beside the products of the block before");
        assert!(!f.spills, "{name}: local memory");
        let (producer, consumer) = f.registers;
        assert!(producer <= f.plan.0 && consumer <= f.plan.1, "{name}: {:?} of {:?}", f.registers, f.plan);
    }
    let (version, before) = report::parse(&text);
    if version != tools.version {
        return println!("{} is not the table's {version}: not compared", tools.version);
    }
    for f in &now {
        let was: &Figures =
            before.iter().find(|b| b.entry == f.entry).expect("run `cargo run --example write_ptx`");
        assert!(
            f.instructions <= was.instructions && f.moves <= was.moves && f.exponentials <= was.exponentials,
            "{} got worse: {f:?}, was {was:?}",
            f.entry
        );
    }
    assert_eq!(before.len(), now.len(), "run `cargo run --example write_ptx` and commit ptx/");
}
