//! From kernel sources to PTX files, with the compiler's own nvptx64 target. Shared by `build.rs` (feature
//! `build-ptx`), the example `write_ptx` and the tests; plain std, no dependencies.
#![allow(dead_code)] // each user takes a part

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, io};

/// Instruction sets: of Ampere, which the driver compiles for any newer GPU, and Hopper's own, for it alone.
pub(crate) const TARGETS: [&str; 2] = ["sm_80", "sm_90a"];

/// Register arrays must not stay arrays: every loop over one is unrolled.
pub(crate) fn rustflags(target: &str) -> String {
    format!(
        "-C target-cpu={target} --cfg ferroflash_target=\"{target}\" --emit=asm -C llvm-args=-unroll-threshold=100000"
    )
}

/// Besides: with Hopper's tiles that are not in use.
pub(crate) const ALTERNATIVES: &str = " --cfg ferroflash_alternatives";

/// An entry, as the sources' table has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) name: String,
    /// Its PTX file is `FAMILY_TARGET.ptx`.
    pub(crate) family: String,
    pub(crate) target: String,
    pub(crate) threads: u32,
    pub(crate) min_ctas: u32,
    pub(crate) shared_bytes: u32,
    pub(crate) params_bytes: u32,
    /// CTAs of a cluster.
    pub(crate) cluster: u32,
}

impl Entry {
    pub(crate) fn file_name(&self) -> String {
        format!("{}_{}.ptx", self.family, self.target)
    }
}

/// What stands in `ptx/manifest.toml`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Manifest {
    /// Hash of the kernel sources.
    pub(crate) source: String,
    /// `rustc --version`.
    pub(crate) compiler: String,
    pub(crate) entries: Vec<Entry>,
}

/// Compiled kernels: the manifest and the PTX files by name.
#[derive(Default)]
pub(crate) struct Ptx {
    pub(crate) manifest: Manifest,
    pub(crate) files: BTreeMap<String, String>,
}

/// FNV-1a, 64 bit, over names and contents of all sources that reach the PTX.
pub(crate) fn source_hash(kernels: &Path) -> io::Result<String> {
    let mut files = Vec::new();
    let mut folders = vec![kernels.join("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                // The simulator is host code.
                if path.file_name().is_some_and(|name| name != "sim") {
                    folders.push(path);
                }
            } else {
                files.push(path);
            }
        }
    }
    files.sort();
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut feed =
        |bytes: &[u8]| bytes.iter().for_each(|b| hash = (hash ^ *b as u64).wrapping_mul(0x100_0000_01b3));
    TARGETS.iter().for_each(|target| feed(rustflags(target).as_bytes()));
    for path in files {
        feed(path.strip_prefix(kernels).unwrap_or(&path).to_string_lossy().as_bytes());
        feed(&fs::read(&path)?);
    }
    Ok(format!("{hash:016x}"))
}

/// A compiler that can build `core` for nvptx64: it has the standard library's sources.
pub(crate) struct Toolchain {
    pub(crate) rustc: PathBuf,
    pub(crate) cargo: PathBuf,
    pub(crate) version: String,
}

impl Toolchain {
    /// `FERROFLASH_PTX_TOOLCHAIN` (a folder with `rustc` and `cargo`), the system's own (Debian: `rustc-web`,
    /// `cargo-web` and `rust-web-src`), or rustup's nightly with the component `rust-src`.
    pub(crate) fn find() -> Result<Self, String> {
        let mut folders: Vec<PathBuf> = Vec::new();
        folders.extend(env::var_os("FERROFLASH_PTX_TOOLCHAIN").map(PathBuf::from));
        folders.push("/usr/bin".into());
        if let Ok(out) = Command::new("rustup").args(["which", "--toolchain", "nightly", "rustc"]).output() {
            let path = PathBuf::from(String::from_utf8_lossy(&out.stdout).trim());
            folders.extend(path.parent().map(Path::to_path_buf));
        }
        let found = folders.iter().find_map(|folder| Self::at(folder));
        found.ok_or_else(|| {
            format!(
                "no Rust compiler with the standard library's sources in {folders:?}; one of: Debian's packages \
                 rustc-web, cargo-web, rust-web-src; `rustup component add --toolchain nightly rust-src`; \
                 FERROFLASH_PTX_TOOLCHAIN=FOLDER"
            )
        })
    }

    fn at(folder: &Path) -> Option<Self> {
        let (rustc, cargo) = (folder.join("rustc"), folder.join("cargo"));
        let ask = |what: &[&str]| {
            let out = Command::new(&rustc).args(what).env_remove("RUSTUP_TOOLCHAIN").output().ok()?;
            out.status.success().then(|| String::from_utf8_lossy(&out.stdout).trim().to_string())
        };
        let sysroot = PathBuf::from(ask(&["--print", "sysroot"])?);
        sysroot.join("lib/rustlib/src/rust/library/core").exists().then_some(())?;
        let version = ask(&["--version"])?;
        cargo.exists().then_some(Toolchain { rustc, cargo, version })
    }

    /// Compiles the kernels; `scratch` keeps `core` for the next time. `besides`: further flags.
    pub(crate) fn compile(&self, kernels: &Path, scratch: &Path, besides: &str) -> Result<Ptx, String> {
        let source = source_hash(kernels).map_err(|e| e.to_string())?;
        let mut ptx = Ptx::default();
        (ptx.manifest.source, ptx.manifest.compiler) = (source, self.version.clone());
        for target in TARGETS {
            let text = self.text(kernels, &scratch.join(target), &(rustflags(target) + besides))?;
            ptx.add(&text, target)?;
        }
        Ok(ptx)
    }

    /// The compiler's PTX, whole.
    pub(crate) fn text(&self, kernels: &Path, scratch: &Path, rustflags: &str) -> Result<String, String> {
        let output = Command::new(&self.cargo)
            .current_dir(kernels)
            .args([
                "build",
                "--release",
                "-Zbuild-std=core",
                "--target",
                "nvptx64-nvidia-cuda",
                "--target-dir",
            ])
            .arg(scratch)
            .env("RUSTC", &self.rustc)
            .env("RUSTC_BOOTSTRAP", "1")
            .env("RUSTFLAGS", rustflags)
            .env("CARGO_PROFILE_RELEASE_PANIC", "abort")
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
            .env("CARGO_PROFILE_RELEASE_LTO", "off")
            .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env_remove("RUSTC_WRAPPER")
            .env_remove("RUSTC_WORKSPACE_WRAPPER")
            .env_remove("RUSTUP_TOOLCHAIN")
            .output()
            .map_err(|e| format!("{}: {e}", self.cargo.display()))?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        let deps = scratch.join("nvptx64-nvidia-cuda/release/deps");
        let text = newest(&deps).and_then(fs::read_to_string);
        text.map_err(|e| format!("the compiler's output in {}: {e}", deps.display()))
    }
}

fn newest(deps: &Path) -> io::Result<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(deps)? {
        let path = entry?.path();
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if name.starts_with("ferroflash_kernels-") && name.ends_with(".s") {
            found.push((fs::metadata(&path)?.modified()?, path));
        }
    }
    found.sort();
    found.pop().map(|f| f.1).ok_or_else(|| io::Error::other("no ferroflash_kernels-*.s"))
}

impl Ptx {
    /// Adds the compiler's text for a target: one per family, with launch bounds and clusters, which Rust has no
    /// attributes for, and without comments.
    pub(crate) fn add(&mut self, text: &str, target: &str) -> Result<(), String> {
        let mut entries = Vec::new();
        for line in text.lines() {
            let Some(rest) = line.trim().strip_prefix("// entry ") else { continue };
            let words: Vec<&str> = rest.split_whitespace().collect();
            let [name, family, _, numbers @ ..] = words.as_slice() else { continue };
            let numbers: Vec<u32> = numbers.iter().filter_map(|n| n.parse().ok()).collect();
            let [threads, min_ctas, shared_bytes, params_bytes, cluster] = numbers[..] else {
                return Err(format!("not an entry: {line}"));
            };
            let (name, family, target) = (name.to_string(), family.to_string(), target.to_string());
            entries.push(Entry {
                name,
                family,
                target,
                threads,
                min_ctas,
                shared_bytes,
                params_bytes,
                cluster,
            });
        }
        let lines: Vec<&str> =
            text.lines().filter(|l| !l.trim_start().starts_with("//") && !l.trim().is_empty()).collect();
        let mut header = String::new();
        let mut files: BTreeMap<String, String> = BTreeMap::new();
        let mut at = 0;
        while at < lines.len() {
            let Some(name) = lines[at].strip_prefix(".visible .entry ").map(|l| l.trim_end_matches('('))
            else {
                if lines[at].starts_with(".extern .func") || lines[at].starts_with(".func") {
                    return Err(format!("a kernel calls a function that was not inlined: {}", lines[at]));
                }
                header.push_str(lines[at]);
                header.push('\n');
                at += 1;
                continue;
            };
            let entry = entries.iter().find(|e| e.name == name);
            let entry = entry.ok_or_else(|| format!("{name} is not in the table of entries"))?;
            let text = files.entry(entry.file_name()).or_default();
            loop {
                let line = lines.get(at).ok_or_else(|| format!("{name} does not end"))?;
                if *line == "{" {
                    let Entry { threads, min_ctas, .. } = entry;
                    let _ = write!(text, ".maxntid {threads}, 1, 1\n.minnctapersm {min_ctas}\n");
                    if entry.cluster > 1 {
                        let _ =
                            write!(text, ".explicitcluster\n.reqnctapercluster {}, 1, 1\n", entry.cluster);
                    }
                }
                // Tensor maps stand at multiples of 64, from CUDA 13 on 128, bytes.
                let parameter = line.trim_start().starts_with(".param .align 8 .b8") && target == "sm_90a";
                let aligned = parameter.then(|| line.replace(".align 8", ".align 128"));
                text.push_str(aligned.as_deref().unwrap_or(line));
                text.push('\n');
                at += 1;
                if *line == "}" {
                    break;
                }
            }
        }
        for text in files.values_mut() {
            text.insert_str(0, &header);
        }
        self.files.append(&mut files);
        self.manifest.entries.append(&mut entries);
        Ok(())
    }
}

impl Manifest {
    pub(crate) fn to_toml(&self) -> String {
        let mut toml = String::from("# Written by `cargo run --example write_ptx`.\n");
        let _ = write!(toml, "source = \"{}\"\ncompiler = \"{}\"\n", self.source, self.compiler);
        for e in &self.entries {
            let _ = write!(
                toml,
                "\n[[entry]]\nname = \"{}\"\nfamily = \"{}\"\ntarget = \"{}\"\nthreads = {}\nmin_ctas = {}\nshared_bytes = {}\nparams_bytes = {}\ncluster = {}\n",
                e.name, e.family, e.target, e.threads, e.min_ctas, e.shared_bytes, e.params_bytes, e.cluster
            );
        }
        toml
    }

    /// Reads what [`Manifest::to_toml`] writes.
    pub(crate) fn parse(toml: &str) -> Result<Self, String> {
        let mut manifest = Manifest::default();
        for line in toml.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
            if line == "[[entry]]" {
                manifest.entries.push(Entry::default());
                continue;
            }
            let (key, value) =
                line.split_once(" = ").ok_or_else(|| format!("not a line of a manifest: {line}"))?;
            let text = value.trim_matches('"').to_string();
            let number = || value.parse::<u32>().map_err(|e| format!("{line}: {e}"));
            match (key, manifest.entries.last_mut()) {
                ("source", None) => manifest.source = text,
                ("compiler", None) => manifest.compiler = text,
                ("name", Some(e)) => e.name = text,
                ("family", Some(e)) => e.family = text,
                ("target", Some(e)) => e.target = text,
                ("threads", Some(e)) => e.threads = number()?,
                ("min_ctas", Some(e)) => e.min_ctas = number()?,
                ("shared_bytes", Some(e)) => e.shared_bytes = number()?,
                ("params_bytes", Some(e)) => e.params_bytes = number()?,
                ("cluster", Some(e)) => e.cluster = number()?,
                _ => return Err(format!("not a line of a manifest: {line}")),
            }
        }
        Ok(manifest)
    }
}
