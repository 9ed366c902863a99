//! Rewrites `ptx/` from the kernel sources: `cargo run --example write_ptx`. Needs a compiler with the standard
//! library's sources; the error says which would do. Where NVIDIA's assembler is installed, the table of Hopper's main
//! loops is written too.

use std::path::Path;
use std::{error, fs};

#[path = "../ptx/assemble.rs"]
mod assemble;
#[path = "../ptx/compile.rs"]
mod compile;
#[path = "../ptx/report.rs"]
mod report;

fn main() -> Result<(), Box<dyn error::Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let toolchain = compile::Toolchain::find()?;
    println!("{}", toolchain.version);
    let ptx = toolchain.compile(&root.join("kernels-gpu"), &root.join("target/nvptx"), "")?;
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
    if let Some(tools) = assemble::Tools::find() {
        let scratch = root.join("target/sass-checks");
        fs::create_dir_all(&scratch)?;
        let figures = report::figures(&tools, &ptx.manifest, &ptx.files, &scratch)?;
        let table = report::table(&figures, &tools.version);
        print!("{table}");
        fs::write(folder.join("sass_sm_90a.txt"), table)?;
    }
    Ok(())
}
