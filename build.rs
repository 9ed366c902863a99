//! Embeds the kernels' PTX: `ptx/*.ptx` as committed, or, with the feature `build-ptx`, compiled from
//! `kernels-gpu/` by the compiler's own nvptx64 target. Without the feature `cuda` there is nothing to embed.

#[cfg(feature = "cuda")]
#[path = "ptx/compile.rs"]
mod compile;

fn main() {
    println!("cargo::rerun-if-changed=ptx");
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    if let Err(error) = cuda::embed() {
        println!("cargo::error={error}");
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::path::{Path, PathBuf};
    use std::{env, fs};

    use super::compile;

    pub(super) fn embed() -> Result<(), String> {
        let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or("no CARGO_MANIFEST_DIR")?);
        let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("no OUT_DIR")?);
        let kernels = root.join("kernels-gpu");
        let folder = if env::var_os("CARGO_FEATURE_BUILD_PTX").is_some() {
            println!("cargo::rerun-if-changed={}", kernels.join("src").display());
            println!("cargo::rerun-if-env-changed=FERROFLASH_PTX_TOOLCHAIN");
            if !kernels.join("src").exists() {
                return Err(
                    "feature build-ptx needs a checkout: the packaged crate has no kernel sources".into()
                );
            }
            let others = env::var_os("CARGO_FEATURE_ALTERNATIVE_TILES").map_or("", |_| compile::ALTERNATIVES);
            let ptx = compile::Toolchain::find()?.compile(&kernels, &out.join("nvptx"), others)?;
            let folder = out.join("ptx");
            write(&folder, &ptx)?;
            folder
        } else {
            root.join("ptx")
        };
        let manifest = read_manifest(&folder)?;
        check_source(&kernels, &manifest);
        table(&folder, &manifest, &out)
    }

    fn write(folder: &Path, ptx: &compile::Ptx) -> Result<(), String> {
        let put =
            |name: &str, text: &str| fs::write(folder.join(name), text).map_err(|e| format!("{name}: {e}"));
        fs::create_dir_all(folder).map_err(|e| e.to_string())?;
        ptx.files.iter().try_for_each(|(name, text)| put(name, text))?;
        put("manifest.toml", &ptx.manifest.to_toml())
    }

    fn read_manifest(folder: &Path) -> Result<compile::Manifest, String> {
        let path = folder.join("manifest.toml");
        let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        compile::Manifest::parse(&text).map_err(|e| format!("{}: {e}", path.display()))
    }

    /// In a checkout the committed PTX must be that of the sources beside it.
    fn check_source(kernels: &Path, manifest: &compile::Manifest) {
        println!("cargo::rerun-if-changed={}", kernels.join("src").display());
        if let Ok(source) = compile::source_hash(kernels)
            && source != manifest.source
        {
            println!(
                "cargo::warning=ptx/ was built from other kernel sources ({}, here {source}): `cargo run --example write_ptx` builds it anew",
                manifest.source
            );
        }
    }

    /// `ptx.rs`: the modules, compressed, and the entries.
    fn table(folder: &Path, manifest: &compile::Manifest, out: &Path) -> Result<(), String> {
        let mut files: Vec<String> = manifest.entries.iter().map(compile::Entry::file_name).collect();
        files.dedup();
        let mut code = String::from("pub(super) static MODULES: &[Module] = &[\n");
        for name in &files {
            let text = fs::read(folder.join(name)).map_err(|e| format!("ptx/{name}: {e}"))?;
            let packed = miniz_oxide::deflate::compress_to_vec(&text, 9);
            let path = out.join(format!("{name}.deflate"));
            fs::write(&path, packed).map_err(|e| e.to_string())?;
            let bytes = text.len();
            code += &format!(
                "    Module {{ name: {name:?}, bytes: {bytes}, deflated: include_bytes!({path:?}) }},\n"
            );
        }
        code += "];\n\npub(super) static ENTRIES: &[Entry] = &[\n";
        for e in &manifest.entries {
            let module = files.iter().position(|f| *f == e.file_name()).ok_or("files are not in runs")?;
            code += &format!(
                "    Entry {{ name: {:?}, module: {module}, threads: {}, shared_bytes: {}, params_bytes: {} }},\n",
                e.name, e.threads, e.shared_bytes, e.params_bytes
            );
        }
        code += "];\n";
        fs::write(out.join("ptx.rs"), code).map_err(|e| e.to_string())
    }
}
