//! GGUF files: a header of typed metadata, a table of tensors, and their data.
//!
//! Nothing of the header is believed before it is checked against the file's length.

use std::collections::HashMap;

use super::quant::{Quant, RowReader};
use super::source::{Bytes, TensorSource};
use crate::error::{Error, Result};

/// A metadata value.
#[derive(Clone, Debug)]
pub enum Value {
    /// Any unsigned or signed integer, or a boolean as 0 or 1.
    Int(i64),
    /// Either float type.
    Float(f64),
    /// A string.
    Str(String),
    /// Strings.
    Strs(Vec<String>),
    /// Integers.
    Ints(Vec<i64>),
    /// Floats.
    Floats(Vec<f64>),
}

/// An opened file.
#[derive(Debug)]
pub struct Gguf {
    bytes: Bytes,
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, Info>,
    data_at: usize,
}

#[derive(Debug)]
struct Info {
    /// Innermost first, as in the file.
    shape: Vec<usize>,
    kind: u32,
    offset: usize,
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(n).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or_else(|| {
            Error::model(format!(
                "the header wants {n} bytes at offset {}, the file has {}: truncated or corrupt",
                self.at,
                self.bytes.len()
            ))
        })?;
        let part = &self.bytes[self.at..end];
        self.at = end;
        Ok(part)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A count of things that take at least `size` bytes each.
    fn count(&mut self, what: &str, size: usize) -> Result<usize> {
        let n = self.u64()?;
        let left = (self.bytes.len() - self.at) / size;
        if n > left as u64 {
            return Err(Error::model(format!("{n} {what} cannot be in the {left} places left in the file")));
        }
        Ok(n as usize)
    }

    fn string(&mut self) -> Result<String> {
        let n = self.count("bytes of a string", 1)?;
        Ok(String::from_utf8_lossy(self.take(n)?).into_owned())
    }

    fn value(&mut self, kind: u32) -> Result<Value> {
        Ok(match kind {
            0 => Value::Int(self.array::<1>()?[0] as i64),
            1 => Value::Int(self.array::<1>()?[0] as i8 as i64),
            2 => Value::Int(u16::from_le_bytes(self.array()?) as i64),
            3 => Value::Int(i16::from_le_bytes(self.array()?) as i64),
            4 => Value::Int(self.u32()? as i64),
            5 => Value::Int(self.u32()? as i32 as i64),
            6 => Value::Float(f32::from_le_bytes(self.array()?) as f64),
            7 => Value::Int((self.array::<1>()?[0] != 0) as i64),
            8 => Value::Str(self.string()?),
            9 => self.list()?,
            10 | 11 => Value::Int(self.u64()? as i64),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(Error::model(format!("metadata type {other} is none of GGUF's"))),
        })
    }

    fn list(&mut self) -> Result<Value> {
        let kind = self.u32()?;
        if kind == 9 {
            return Err(Error::model("a list of lists in the metadata"));
        }
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            _ => 8,
        };
        let n = self.count("list entries", size)?;
        let (mut strs, mut ints, mut floats) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..n {
            match self.value(kind)? {
                Value::Int(x) => ints.push(x),
                Value::Float(x) => floats.push(x),
                Value::Str(x) => strs.push(x),
                _ => return Err(Error::model("a list of lists in the metadata")),
            }
        }
        Ok(match kind {
            8 => Value::Strs(strs),
            6 | 12 => Value::Floats(floats),
            _ => Value::Ints(ints),
        })
    }
}

impl Gguf {
    /// Reads the header.
    pub fn open(bytes: Bytes) -> Result<Self> {
        let mut cursor = Cursor { bytes: &bytes, at: 0 };
        if cursor.take(4)? != b"GGUF" {
            return Err(Error::model("not a GGUF file: its first bytes are not `GGUF`"));
        }
        let version = cursor.u32()?;
        if !(2..=3).contains(&version) {
            return Err(Error::model(format!("GGUF version {version}; versions 2 and 3 are supported")));
        }
        let num_tensors = cursor.count("tensors", 24)?;
        let num_values = cursor.count("metadata entries", 13)?;
        let mut metadata = HashMap::new();
        for _ in 0..num_values {
            let key = cursor.string()?;
            let kind = cursor.u32()?;
            let value = cursor.value(kind).map_err(|e| e.within(format!("metadata {key:?}")))?;
            metadata.insert(key, value);
        }
        let mut tensors = HashMap::new();
        for _ in 0..num_tensors {
            let name = cursor.string()?;
            let rank = cursor.u32()?;
            if rank > 4 {
                return Err(Error::model(format!(
                    "tensor {name:?} has {rank} dimensions, at most 4 are possible"
                )));
            }
            let shape: Vec<usize> = (0..rank).map(|_| Ok(cursor.u64()? as usize)).collect::<Result<_>>()?;
            let kind = cursor.u32()?;
            let offset = cursor.u64()? as usize;
            if tensors.insert(name.clone(), Info { shape, kind, offset }).is_some() {
                return Err(Error::model(format!("tensor {name:?} comes twice")));
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(Value::Int(n)) if *n > 0 && *n <= 1 << 20 => *n as usize,
            Some(other) => return Err(Error::model(format!("general.alignment is {other:?}"))),
        };
        let data_at = cursor.at.next_multiple_of(alignment);
        Ok(Gguf { bytes, metadata, tensors, data_at })
    }

    /// A metadata value.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// A string.
    pub fn str(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Value::Str(s) => Some(s),
            _ => None,
        }
    }

    /// An integer that is not negative.
    pub fn uint(&self, key: &str) -> Option<usize> {
        match self.get(key)? {
            Value::Int(n) => usize::try_from(*n).ok(),
            _ => None,
        }
    }

    /// A number.
    pub fn number(&self, key: &str) -> Option<f64> {
        match self.get(key)? {
            Value::Int(n) => Some(*n as f64),
            Value::Float(x) => Some(*x),
            _ => None,
        }
    }
}

impl TensorSource for Gguf {
    fn tensor(&self, name: &str) -> Result<Option<(RowReader<'_>, Vec<usize>)>> {
        let Some(info) = self.tensors.get(name) else { return Ok(None) };
        let quant = Quant::from_ggml(info.kind).ok_or_else(|| {
            Error::model(format!(
                "tensor {name:?} has ggml type {}; supported are F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, \
                 Q5_K, Q6_K",
                info.kind
            ))
        })?;
        let row_len = info.shape.first().copied().unwrap_or(1);
        let rows = info.shape.iter().skip(1).try_fold(1usize, |n, &d| n.checked_mul(d));
        let (elements, size) = quant.block();
        let range = rows.and_then(|rows| {
            let len = (row_len / elements).checked_mul(size)?.checked_mul(rows)?;
            let start = self.data_at.checked_add(info.offset)?;
            Some((rows, start..start.checked_add(len)?))
        });
        match range {
            Some((rows, range)) if range.end <= self.bytes.len() => {
                let reader = RowReader::new(quant, &self.bytes[range], rows, row_len);
                let shape = info.shape.iter().rev().copied().collect();
                Ok(Some((reader.map_err(|e| e.within(format!("tensor {name:?}")))?, shape)))
            }
            _ => Err(Error::model(format!(
                "tensor {name:?}, shape {:?} at offset {}, reaches past the end of the file ({} bytes): truncated or \
                 corrupt",
                info.shape,
                info.offset,
                self.bytes.len()
            ))),
        }
    }
}
