//! Quantises a stored matrix, and writes a quantised checkpoint: matrices in the very form the products read, so that loading
//! one maps it and no more.
//!
//! Called by [`super::layers`] and `cli/quantize.rs`, which thus get the same bits. Embeddings stay floats, since
//! their rows are read where they lie; the head is stored beside them, also where a model's own is tied to them.

use std::path::Path;

use serde_json::json;
use thiserror::Error;

use super::{
    checkpoint::{Checkpoint, TokenizerFiles},
    checkpoint_writer::{CheckpointWriter, MAX_SHARD_BYTES, Planned, TensorSink, WriteError, pretty, split},
    embedded,
    hub::SMALL_FILES,
    kernels::panels::{Bits, PackError, QuantPanels, VERSION},
    layout::{EMBEDDINGS, TensorSpec},
    shards::PANELS_FORMAT,
    weights::{Weights, WeightsError},
};

/// Why a checkpoint cannot be quantised: one sentence.
#[derive(Debug, Error)]
pub enum QuantizeError {
    #[error("{id} is quantised to {} already: give the checkpoint it was made from", bits.name())]
    Already { id: String, bits: Bits },
    #[error("{file} cannot be read: {source}")]
    Io { file: String, source: std::io::Error },
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// Quantises a matrix that is stored as floats. What is read of a mapped file is given back.
pub(super) fn quantise(weights: &Weights, name: &str, asked: Bits) -> Result<QuantPanels, WeightsError> {
    let stored = weights.get(name)?;
    let k = stored.shape[1..].iter().product();
    let bits = weights.bits(name, asked)?;
    let packed = QuantPanels::pack(
        stored.shape[0],
        k,
        bits,
        #[inline(always)]
        |row, start, out| stored.copy_f32(row * k + start, out),
    );
    weights.release(name);
    packed.map_err(|error| match error {
        PackError::Value { row } => WeightsError::NotFinite { tensor: name.into(), row },
        PackError::Memory { num_bytes, source } => {
            WeightsError::Memory { tensor: name.into(), num_bytes, source }
        }
    })
}

/// Bytes of all tensors that [`write_quantised`] writes.
pub fn num_bytes(checkpoint: &Checkpoint, bits: Bits) -> Result<u64, QuantizeError> {
    Ok(plan(checkpoint, bits)?.iter().map(|tensor| tensor.num_bytes).sum())
}

/// Writes `checkpoint`, quantised to `bits`, to a directory that does not exist or is empty. Takes as much memory as its
/// largest matrix. `on_written` is told the bytes of tensors as they are written, [`num_bytes`] in all. After an error
/// nothing is left behind.
pub fn write_quantised(
    checkpoint: &Checkpoint,
    bits: Bits,
    out: &Path,
    on_written: &mut dyn FnMut(u64),
) -> Result<(), QuantizeError> {
    write_split(checkpoint, bits, out, MAX_SHARD_BYTES, on_written)
}

fn write_split(
    checkpoint: &Checkpoint,
    bits: Bits,
    out: &Path,
    max_shard_bytes: u64,
    on_written: &mut dyn FnMut(u64),
) -> Result<(), QuantizeError> {
    if let Some(bits) = checkpoint.weights.quantised() {
        return Err(QuantizeError::Already { id: checkpoint.id.clone(), bits });
    }
    let tensors = plan(checkpoint, bits)?;
    let writer = CheckpointWriter::new(out, tensors.iter().map(|tensor| tensor.num_bytes).sum())?;
    let metadata = json!({"format": PANELS_FORMAT, "version": VERSION.to_string(), "quant": bits.name()});
    writer.weights(&split(tensors, max_shard_bytes), &metadata, |tensor, sink| {
        write_tensor(&checkpoint.weights, tensor, bits, sink)?;
        on_written(tensor.num_bytes);
        Ok::<_, QuantizeError>(())
    })?;
    small_files(checkpoint, &writer)?;
    Ok(writer.finish()?)
}

/// Every tensor, in the order of the network.
fn plan(checkpoint: &Checkpoint, bits: Bits) -> Result<Vec<Planned>, QuantizeError> {
    let planned = |spec: TensorSpec| {
        let (dtype, element_bytes) = match spec.panels {
            Some(_) => ("U8", 1),
            None => {
                let dtype = checkpoint.weights.stored_dtype(&spec.name)?;
                (dtype.name(), dtype.num_bytes())
            }
        };
        let shape = spec.stored_shape();
        let num_bytes = (shape.iter().product::<usize>() * element_bytes) as u64;
        Ok(Planned { name: spec.name, dtype, shape, num_bytes })
    };
    checkpoint.config.quantised_tensors(bits).into_iter().map(planned).collect()
}

fn write_tensor(
    weights: &Weights,
    tensor: &Planned,
    bits: Bits,
    sink: &mut TensorSink<'_>,
) -> Result<(), QuantizeError> {
    if tensor.dtype == "U8" {
        // A head that is not stored is tied to the embeddings.
        let source = if weights.contains(&tensor.name) { tensor.name.as_str() } else { EMBEDDINGS };
        return Ok(sink.write(quantise(weights, source, bits)?.bytes())?);
    }
    let stored = weights.get(&tensor.name)?;
    if let Some(at) = stored.first_not_finite() {
        let row = at / tensor.shape[1..].iter().product::<usize>();
        return Err(WeightsError::NotFinite { tensor: tensor.name.clone(), row }.into());
    }
    sink.write(&stored.data)?;
    weights.release(&tensor.name);
    Ok(())
}

/// Config, sampling defaults and tokenizer, as they are.
fn small_files(checkpoint: &Checkpoint, writer: &CheckpointWriter) -> Result<(), QuantizeError> {
    let plain = SMALL_FILES.iter().filter(|name| !name.contains('/') && **name != "config.json");
    for name in plain {
        let bytes = checkpoint.tokenizer.read(name);
        let bytes = bytes.map_err(|source| QuantizeError::Io { file: (*name).into(), source })?;
        if let Some(bytes) = bytes {
            writer.small(name, &bytes)?;
        }
    }
    if checkpoint.tokenizer == TokenizerFiles::Embedded {
        writer.small("generation_config.json", embedded::GENERATION_CONFIG.as_bytes())?;
    }
    Ok(writer.small("config.json", pretty(&checkpoint.config_json).as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::{
        super::{checkpoint::ModelSpec, layers::WeightFormat, presets::Preset},
        *,
    };

    fn nano() -> Checkpoint {
        Checkpoint::open(&ModelSpec::Nano).unwrap()
    }

    #[test]
    fn shards_hold_the_same_panels_as_quantising_at_load_and_are_aligned() {
        let (dir, source) = (tempfile::tempdir().unwrap(), nano());
        let total = num_bytes(&source, Bits::Four).unwrap();
        for max_shard_bytes in [MAX_SHARD_BYTES, total / 3] {
            let out = dir.path().join(max_shard_bytes.to_string());
            let mut written = 0;
            write_split(&source, Bits::Four, &out, max_shard_bytes, &mut |bytes| written += bytes).unwrap();
            assert_eq!(written, total);
            let made = Checkpoint::open_directory("made".into(), &out).unwrap();
            assert_eq!(made.weights.quantised(), Some(Bits::Four));
            assert_eq!((&made.config, &made.generation), (&source.config, &source.generation));
            assert_eq!(made.weights.num_bytes(), total);
            for spec in made.config.quantised_tensors(Bits::Four) {
                if spec.panels.is_none() {
                    let (a, b) = (made.weights.get(&spec.name), source.weights.get(&spec.name));
                    assert!(a.unwrap().data == b.unwrap().data, "{}", spec.name);
                    continue;
                }
                let from = if source.weights.contains(&spec.name) { &spec.name } else { EMBEDDINGS };
                let (a, b) = (made.weights.panels(&spec.name), quantise(&source.weights, from, Bits::Four));
                let (a, b) = (a.unwrap().unwrap(), b.unwrap());
                assert!(a.bytes() == b.bytes(), "{}", spec.name);
                assert_eq!(a.bytes().as_ptr().addr() % super::super::kernels::panels::ALIGNMENT, 0);
            }
        }
    }

    #[test]
    fn what_is_quantised_stays_so() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("made");
        write_quantised(&nano(), Bits::Eight, &out, &mut |_| ()).unwrap();
        let made = Checkpoint::open_directory("made".into(), &out).unwrap();
        let again = write_quantised(&made, Bits::Four, &dir.path().join("again"), &mut |_| ()).unwrap_err();
        assert!(again.to_string().contains("made is quantised to q8 already"), "{again}");
        assert!(made.weights.check_format(WeightFormat::Quant(Bits::Eight)).is_ok());
        for format in [WeightFormat::Quant(Bits::Four), WeightFormat::AsStored] {
            let error = made.weights.check_format(format).unwrap_err().to_string();
            assert!(error.contains("quantised to q8 already"), "{error}");
        }
        assert!(matches!(made.weights.get(super::super::layout::HEAD), Err(WeightsError::Quantised { .. })));
    }

    #[test]
    fn the_published_size_is_one_file() {
        let spec = ModelSpec::Synthetic { preset: Preset::R1, seed: 0 };
        let checkpoint = Checkpoint::open(&spec).unwrap();
        let gigabytes = |bits| num_bytes(&checkpoint, bits).unwrap() as f64 / 1e9;
        // 622 MB of embeddings in bf16, the rest in panels.
        assert_eq!(format!("{:.2} {:.2}", gigabytes(Bits::Eight), gigabytes(Bits::Four)), "4.34 3.04");
        let shards = split(plan(&checkpoint, Bits::Eight).unwrap(), MAX_SHARD_BYTES);
        assert_eq!(shards.len(), 1);
    }
}
