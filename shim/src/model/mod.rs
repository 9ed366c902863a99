//! Models: files to weights, tokens to logits.

pub mod config;
pub mod forward;
pub mod gguf;
pub mod linear;
pub mod quant;
pub mod source;
pub mod weights;

use std::path::Path;

use ferroflash::Device;

use crate::error::{Error, Result};
use crate::text::Text;
use config::Config;
use gguf::Gguf;
use source::{Folder, Shards};
use weights::{GGUF_NAMES, HF_NAMES, Weights};

/// A model in memory, with its tokenizer and chat template.
#[derive(Debug)]
pub struct Model {
    /// Sizes and constants.
    pub config: Config,
    /// Tokenizer and chat template.
    pub text: Text,
    pub(crate) weights: Weights,
    pub(crate) device: Device,
}

impl Model {
    /// Loads `tiny` (the model in the program), a Hugging Face folder, or a GGUF file.
    pub fn load(device: &Device, path: &str) -> Result<Self> {
        let at = Path::new(path);
        let loaded = if path == "tiny" {
            Self::from_folder(device, &Folder::Tiny)
        } else if at.is_dir() {
            Self::from_folder(device, &Folder::Dir(at.to_path_buf()))
        } else if at.is_file() {
            Self::from_gguf(device, at)
        } else {
            Err(Error::model(
                "no such file or folder; a Hugging Face folder, a .gguf file or `tiny` would work",
            ))
        };
        loaded.map_err(|e| e.within(path))
    }

    fn from_folder(device: &Device, folder: &Folder) -> Result<Self> {
        let config =
            folder.json("config.json")?.ok_or_else(|| Error::model("no config.json in the folder"))?;
        let generation = folder.json("generation_config.json")?;
        let config = Config::from_hf(&config, generation.as_ref()).map_err(|e| e.within("config.json"))?;
        let text = Text::from_folder(folder)?;
        let shards = Shards::open(folder)?;
        Self::assemble(device, config, text, Weights::load(device, &shards, &HF_NAMES))
    }

    fn from_gguf(device: &Device, path: &Path) -> Result<Self> {
        let file = Gguf::open(source::map(path)?)?;
        let config = Config::from_gguf(&file)?;
        let text = Text::from_gguf(&file)?;
        Self::assemble(device, config, text, Weights::load(device, &file, &GGUF_NAMES))
    }

    fn assemble(
        device: &Device,
        config: Config,
        text: Text,
        load: impl FnOnce(&Config) -> Result<Weights>,
    ) -> Result<Self> {
        if text.vocab_size() > config.vocab_size {
            // Some fine-tunes add a padding token that the model never learnt; prompts are checked anyway.
            tracing::warn!("the tokenizer has {} tokens, the model {}", text.vocab_size(), config.vocab_size);
        }
        let weights = load(&config)?;
        Ok(Model { config, text, weights, device: device.clone() })
    }
}
