//! Will embed `ptx/` and check its manifest. No kernel is compiled yet, so there is nothing to embed.

fn main() {
    println!("cargo::rerun-if-changed=ptx");
}
