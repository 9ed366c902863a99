//! Where a model's files are: a folder, a file, or the folder that the program carries.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::tensor::{Dtype, SafeTensors};

use super::quant::{Quant, RowReader};
use crate::error::{Error, Result};

/// A file's bytes.
#[derive(Clone, Debug)]
pub enum Bytes {
    /// Part of the program.
    Embedded(&'static [u8]),
    /// Mapped.
    Mapped(Arc<Mmap>),
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Embedded(bytes) => bytes,
            Bytes::Mapped(map) => map,
        }
    }
}

/// Maps a file.
pub fn map(path: &Path) -> Result<Bytes> {
    let failed = |e: std::io::Error| Error::model(format!("{}: {e}", path.display()));
    let file = File::open(path).map_err(failed)?;
    // SAFETY: the map is only read. Another process that cuts the file short while it is mapped ends
    // this one by a signal; it cannot be prevented, and reading model files whole would double memory.
    let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
    Ok(Bytes::Mapped(Arc::new(map)))
}

/// The model that the program carries; `shim/tiny/train.py` makes it.
const TINY: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("../../tiny/model/config.json")),
    ("model.safetensors", include_bytes!("../../tiny/model/model.safetensors")),
    ("tokenizer.json", include_bytes!("../../tiny/model/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../tiny/model/tokenizer_config.json")),
];

/// A Hugging Face folder.
#[derive(Clone, Debug)]
pub enum Folder {
    /// On disk.
    Dir(PathBuf),
    /// In the program.
    Tiny,
}

impl Folder {
    /// A file of the folder; `None` where it is not there.
    pub fn file(&self, name: &str) -> Result<Option<Bytes>> {
        match self {
            Folder::Tiny => {
                let found = TINY.iter().find(|(n, _)| *n == name);
                Ok(found.map(|(_, bytes)| Bytes::Embedded(bytes)))
            }
            Folder::Dir(dir) => {
                let path = dir.join(name);
                if path.is_file() { map(&path).map(Some) } else { Ok(None) }
            }
        }
    }

    /// A JSON file of the folder; `None` where it is not there.
    pub fn json(&self, name: &str) -> Result<Option<serde_json::Value>> {
        let Some(bytes) = self.file(name)? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(|e| Error::model(format!("{name}: {e}")))
    }
}

/// Named tensors of a model.
pub trait TensorSource {
    /// A tensor's rows and shape (outermost first); `None` where there is no such tensor.
    fn tensor(&self, name: &str) -> Result<Option<(RowReader<'_>, Vec<usize>)>>;
}

/// One or several safetensors files.
#[derive(Debug)]
pub struct Shards {
    files: Vec<Bytes>,
    /// File, element type, shape and byte range of each tensor.
    tensors: HashMap<String, (usize, Dtype, Vec<usize>, std::ops::Range<usize>)>,
}

impl Shards {
    /// Reads the headers of `model.safetensors`, or of the shards that its index names.
    pub fn open(folder: &Folder) -> Result<Self> {
        let names = match folder.json("model.safetensors.index.json")? {
            None => vec!["model.safetensors".to_string()],
            Some(index) => {
                let map = index["weight_map"].as_object();
                let map = map
                    .ok_or_else(|| Error::model("model.safetensors.index.json has no object `weight_map`"))?;
                let mut names: Vec<String> =
                    map.values().filter_map(|v| v.as_str().map(String::from)).collect();
                names.sort_unstable();
                names.dedup();
                if let Some(name) = names.iter().find(|n| n.contains(['/', '\\'])) {
                    return Err(Error::model(format!(
                        "model.safetensors.index.json names {name:?}, not a plain file"
                    )));
                }
                names
            }
        };
        let mut shards = Shards { files: Vec::new(), tensors: HashMap::new() };
        for name in names {
            let missing = || Error::model(format!("{name} is not in the model's folder"));
            let bytes = folder.file(&name)?.ok_or_else(missing)?;
            let parsed =
                SafeTensors::deserialize(&bytes).map_err(|e| Error::model(format!("{name}: {e}")))?;
            for (tensor, view) in parsed.iter() {
                let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
                let range = start..start + view.data().len();
                let entry = (shards.files.len(), view.dtype(), view.shape().to_vec(), range);
                shards.tensors.insert(tensor.to_string(), entry);
            }
            shards.files.push(bytes);
        }
        Ok(shards)
    }
}

impl TensorSource for Shards {
    fn tensor(&self, name: &str) -> Result<Option<(RowReader<'_>, Vec<usize>)>> {
        let Some((file, dtype, shape, range)) = self.tensors.get(name) else { return Ok(None) };
        let quant = match dtype {
            Dtype::F32 => Quant::F32,
            Dtype::F16 => Quant::F16,
            Dtype::BF16 => Quant::BF16,
            other => {
                return Err(Error::model(format!(
                    "tensor {name:?} is {other:?}; F32, F16 and BF16 are supported"
                )));
            }
        };
        let row_len = shape.last().copied().unwrap_or(1);
        let rows = shape.iter().rev().skip(1).product();
        let reader = RowReader::new(quant, &self.files[*file][range.clone()], rows, row_len);
        Ok(Some((reader.map_err(|e| e.within(format!("tensor {name:?}")))?, shape.clone())))
    }
}
