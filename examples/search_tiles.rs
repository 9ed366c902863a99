//! Other tiles for Hopper's prefill: what each would take in registers, shared memory and instructions, beside those that
//! are used. `cargo run --example search_tiles` needs what `write_ptx` needs, and NVIDIA's assembler. On a GPU they are timed
//! by `cargo bench --features alternative-tiles --bench gpu -- tiles`.

use std::path::Path;
use std::{error, fs};

use ferroflash_kernels::abi::PREFILL_SM90;
use ferroflash_kernels::kernels::ALTERNATIVES;

#[path = "../ptx/assemble.rs"]
mod assemble;
#[path = "../ptx/compile.rs"]
mod compile;
#[path = "../ptx/report.rs"]
mod report;

fn main() -> Result<(), Box<dyn error::Error>> {
    println!("The tiles in use:");
    PREFILL_SM90.iter().for_each(|tile| println!("  {tile}"));
    let Some(tools) = assemble::Tools::find() else { return Ok(()) };
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let flags = compile::rustflags("sm_90a") + compile::ALTERNATIVES;
    let scratch = root.join("target/nvptx/alternatives");
    let text = compile::Toolchain::find()?.text(&root.join("kernels-gpu"), &scratch, &flags)?;
    let mut ptx = compile::Ptx::default();
    ptx.add(&text, "sm_90a")?;
    fs::create_dir_all(root.join("target/sass-checks"))?;
    let file = "alternatives_sm_90a.ptx";
    let text = ptx.files.get(file).ok_or("no alternatives in the compiler's text")?;
    let assembled = tools.assemble(file, text, "sm_90a", &root.join("target/sass-checks"))?;
    let codes = tools.disassemble(&assembled)?;
    println!(
        "\nOthers (rows x tokens), a block in the main loop; cycles of tensor cores, exponentials and issue:"
    );
    for (tile, entry) in ALTERNATIVES {
        let (k, v, rows, block) = (tile.head_dim, tile.v_head_dim, tile.rows, tile.block);
        let (resources, code) = (&assembled.entries[entry.name], &codes[entry.name]);
        let Some(round) = code.main_loop() else { continue };
        let figures = report::Figures::new(entry.name, (k, v), block, code, &round);
        // The report's cycles are for two consumers.
        let (tensor, exp, issue) = figures.cycles();
        let [tensor, exp, issue] = [tensor, exp, issue].map(|cycles| cycles as usize * rows / 128);
        println!(
            "  {rows} x {block}, {k}/{v} channels: {} bytes spilled, {} KiB shared, {} instructions ({}), {tensor}/{exp}/{issue} \
             cycles{}",
            resources.spills,
            entry.shared_bytes >> 10,
            figures.instructions,
            figures.ideal.instructions(),
            if entry.shared_bytes > 227 << 10 { ", more shared memory than there is" } else { "" },
        );
    }
    assembled.complaints.iter().for_each(|c| println!("  {c}"));
    Ok(())
}
