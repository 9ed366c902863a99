//! Rewrites `ptx/` from the kernel sources: `cargo run --example write_ptx`. Needs a compiler with the standard
//! library's sources; the error says which would do.

use std::path::Path;
use std::{error, fs};

#[path = "../ptx/compile.rs"]
mod compile;

fn main() -> Result<(), Box<dyn error::Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let toolchain = compile::Toolchain::find()?;
    println!("{}", toolchain.version);
    let ptx = toolchain.compile(&root.join("kernels-gpu"), &root.join("target/nvptx"))?;
    let folder = root.join("ptx");
    for entry in fs::read_dir(&folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "ptx") {
            fs::remove_file(path)?;
        }
    }
    for (name, text) in &ptx.files {
        fs::write(folder.join(name), text)?;
        println!("ptx/{name}: {} bytes", text.len());
    }
    fs::write(folder.join("manifest.toml"), ptx.manifest.to_toml())?;
    println!("{} entries, source {}", ptx.manifest.entries.len(), ptx.manifest.source);
    Ok(())
}
