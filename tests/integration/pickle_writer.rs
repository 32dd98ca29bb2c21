//! Writes PyTorch files as `torch.save` does: an archive with a pickle of an `OrderedDict` and a
//! member for each storage.

use std::{fs, path::Path};

/// One tensor of a state dict.
#[derive(Clone)]
pub struct Pickled {
    pub key: String,
    /// The storage class in torch: `FloatStorage`, `BFloat16Storage`, `LongStorage`.
    pub storage: &'static str,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
    /// The key of the tensor that holds the bytes, if they are shared; `bytes` is then not used.
    pub shares: Option<String>,
}

/// Writes a state dict.
pub fn write_pickle(path: &Path, tensors: &[Pickled]) {
    let mut members = vec![("archive/data.pkl".to_owned(), pickle(tensors))];
    for (number, tensor) in tensors.iter().enumerate() {
        if tensor.shares.is_none() {
            members.push((format!("archive/data/{number}"), tensor.bytes.clone()));
        }
    }
    members.push(("archive/version".into(), b"3\n".to_vec()));
    fs::write(path, archive(&members)).unwrap();
}

fn pickle(tensors: &[Pickled]) -> Vec<u8> {
    let mut out = vec![0x80, 2];
    ordered_dict(&mut out);
    out.push(b'(');
    for tensor in tensors {
        text(&mut out, &tensor.key);
        let owner = tensor.shares.as_ref().unwrap_or(&tensor.key);
        let number = tensors.iter().position(|tensor| tensor.key == *owner).unwrap();
        let len: usize = tensor.shape.iter().product();
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut out, "storage");
        out.extend(format!("ctorch\n{}\n", tensor.storage).bytes());
        text(&mut out, &number.to_string());
        text(&mut out, "cpu");
        int(&mut out, len);
        out.extend(b"tQ");
        int(&mut out, 0);
        let stride = |axis: usize| tensor.shape[axis + 1..].iter().product();
        tuple(&mut out, &tensor.shape);
        tuple(&mut out, &(0..tensor.shape.len()).map(stride).collect::<Vec<_>>());
        out.push(0x89);
        ordered_dict(&mut out);
        out.extend(b"tR");
    }
    out.push(b'u');
    // The state of the dict itself, as modules give it.
    out.push(b'}');
    text(&mut out, "_metadata");
    ordered_dict(&mut out);
    out.extend(b"sb.");
    out
}

fn ordered_dict(out: &mut Vec<u8>) {
    out.extend(b"ccollections\nOrderedDict\n)R");
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.bytes());
}

fn int(out: &mut Vec<u8>, value: usize) {
    out.push(b'J');
    out.extend((value as u32).to_le_bytes());
}

fn tuple(out: &mut Vec<u8>, values: &[usize]) {
    out.push(b'(');
    values.iter().for_each(|value| int(out, *value));
    out.push(b't');
}

/// A zip archive of members that are not compressed.
fn archive(members: &[(String, Vec<u8>)]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, bytes) in members {
        let offset = out.len() as u32;
        // Version 2.0, no flags, stored, no time.
        let mut common = vec![20, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        common.extend(crc32(bytes).to_le_bytes());
        common.extend([bytes.len() as u32; 2].iter().flat_map(|len| len.to_le_bytes()));
        common.extend((name.len() as u16).to_le_bytes());
        common.extend([0; 2]);
        out.extend(b"PK\x03\x04");
        out.extend(&common);
        out.extend(name.bytes());
        out.extend(bytes);
        directory.extend(b"PK\x01\x02\x14\x00");
        directory.extend(&common);
        directory.extend([0; 10]);
        directory.extend(offset.to_le_bytes());
        directory.extend(name.bytes());
    }
    let (start, len) = (out.len() as u32, directory.len() as u32);
    out.extend(directory);
    out.extend(b"PK\x05\x06\0\0\0\0");
    out.extend([members.len() as u16; 2].iter().flat_map(|count| count.to_le_bytes()));
    out.extend(len.to_le_bytes());
    out.extend(start.to_le_bytes());
    out.extend([0; 2]);
    out
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            let carry = if crc & 1 == 1 { 0xedb8_8320 } else { 0 };
            crc = crc >> 1 ^ carry;
        }
    }
    !crc
}
