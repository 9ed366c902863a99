//! The embedded kernels. `build.rs` writes the tables from `ptx/manifest.toml`.

/// One PTX file.
pub(super) struct Module {
    pub(super) name: &'static str,
    bytes: usize,
    deflated: &'static [u8],
}

/// One entry of a module.
pub(super) struct Entry {
    pub(super) name: &'static str,
    /// Index in [`MODULES`].
    pub(super) module: usize,
    pub(super) threads: u32,
    pub(super) shared_bytes: u32,
    pub(super) params_bytes: u32,
}

include!(concat!(env!("OUT_DIR"), "/ptx.rs"));

impl Module {
    /// The PTX, ended by a NUL.
    pub(super) fn text(&self) -> Result<Vec<u8>, String> {
        let inflated = miniz_oxide::inflate::decompress_to_vec_with_limit(self.deflated, self.bytes);
        let mut text = inflated.map_err(|e| format!("the embedded PTX is damaged: {e}"))?;
        text.push(0);
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_module_inflates_and_has_its_entries() {
        for (i, module) in MODULES.iter().enumerate() {
            let text = String::from_utf8(module.text().unwrap()).unwrap();
            assert_eq!(text.len(), module.bytes + 1);
            for entry in ENTRIES.iter().filter(|e| e.module == i) {
                assert!(text.contains(&format!(".visible .entry {}(", entry.name)), "{}", entry.name);
            }
        }
    }

    #[test]
    #[cfg(feature = "sim")]
    fn the_manifest_is_the_sources_table() {
        use ferroflash_kernels::kernels::{ALTERNATIVES, ENTRIES as ENTRIES_OF_SOURCE};
        let names = |e: &Entry| (e.name, MODULES[e.module].name, e.threads, e.shared_bytes, e.params_bytes);
        let built: Vec<_> = ENTRIES.iter().map(names).collect();
        let others = ALTERNATIVES.iter().map(|a| &a.1).filter(|_| cfg!(feature = "alternative-tiles"));
        let source: Vec<_> = ENTRIES_OF_SOURCE
            .iter()
            .chain(others)
            .map(|e| {
                (e.name, format!("{}_{}.ptx", e.family, e.target), e.threads, e.shared_bytes, e.params_bytes)
            })
            .collect();
        assert_eq!(built.len(), source.len());
        for (b, s) in built.iter().zip(&source) {
            assert_eq!((b.0, b.1, b.2, b.3, b.4), (s.0, s.1.as_str(), s.2, s.3, s.4));
        }
    }
}
