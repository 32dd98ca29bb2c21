//! What the kernel `rope_and_cache` does, in plain loops, and where it puts things.
//!
//! Called by tests only: on a CPU against the tensor operations, and against the kernel where there is a GPU.

/// Sizes of a layer.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub dim: usize,
    pub block_size: usize,
    /// Elements of a piece of 16 bytes, in which keys lie.
    pub vector: usize,
}

/// What comes out.
#[derive(Debug)]
pub struct Turned {
    /// `[rows, heads + kv_heads, dim]`
    pub turned: Vec<f32>,
    /// `[blocks, kv_heads, dim / vector, block_size, vector]`
    pub keys: Vec<f32>,
    /// `[blocks, kv_heads, dim, block_size]`
    pub values: Vec<f32>,
}

impl Sizes {
    /// `qkv` `[rows, heads + 2 kv_heads, dim]`, `cos` and `sin` `[rows, dim / 2]`; a negative slot is none.
    pub fn rope_and_cache(
        &self,
        qkv: &[f32],
        (cos, sin): (&[f32], &[f32]),
        slots: &[i64],
        num_blocks: usize,
    ) -> Turned {
        let (half, turning) = (self.dim / 2, self.num_heads + self.num_kv_heads);
        let side = vec![0.0; num_blocks * self.num_kv_heads * self.dim * self.block_size];
        let mut out = Turned { turned: vec![], keys: side.clone(), values: side };
        for (row, (qkv, &slot)) in qkv.chunks((turning + self.num_kv_heads) * self.dim).zip(slots).enumerate()
        {
            let (cos, sin) = (&cos[row * half..][..half], &sin[row * half..][..half]);
            for (head, x) in qkv.chunks(self.dim).enumerate().take(turning) {
                let low = (0..half).map(|i| x[i] * cos[i] - x[half + i] * sin[i]);
                let high = (0..half).map(|i| x[half + i] * cos[i] + x[i] * sin[i]);
                let turned: Vec<f32> = low.chain(high).collect();
                if let (Some(head), Ok(slot)) = (head.checked_sub(self.num_heads), usize::try_from(slot)) {
                    for (i, &key) in turned.iter().enumerate() {
                        out.keys[self.key_place(slot, head, i)] = key;
                    }
                }
                out.turned.extend(turned);
            }
            let Ok(slot) = usize::try_from(slot) else { continue };
            for (head, x) in qkv[turning * self.dim..].chunks(self.dim).enumerate() {
                for (i, &value) in x.iter().enumerate() {
                    out.values[self.value_place(slot, head, i)] = value;
                }
            }
        }
        out
    }

    /// The keys at `slots`, `[slots, kv_heads, dim]`.
    pub fn keys_at(&self, keys: &[f32], slots: &[i64]) -> Vec<f32> {
        self.at(slots, |slot, head, i| keys[self.key_place(slot, head, i)])
    }

    /// The values at `slots`, `[slots, kv_heads, dim]`.
    pub fn values_at(&self, values: &[f32], slots: &[i64]) -> Vec<f32> {
        self.at(slots, |slot, head, i| values[self.value_place(slot, head, i)])
    }

    fn at(&self, slots: &[i64], element: impl Fn(usize, usize, usize) -> f32) -> Vec<f32> {
        let mut all = vec![];
        for &slot in slots {
            for head in 0..self.num_kv_heads {
                all.extend((0..self.dim).map(|i| element(slot as usize, head, i)));
            }
        }
        all
    }

    fn key_place(&self, slot: usize, head: usize, i: usize) -> usize {
        let (block, place) = (slot / self.block_size, slot % self.block_size);
        let piece = (block * self.num_kv_heads + head) * (self.dim / self.vector) + i / self.vector;
        (piece * self.block_size + place) * self.vector + i % self.vector
    }

    fn value_place(&self, slot: usize, head: usize, i: usize) -> usize {
        let (block, place) = (slot / self.block_size, slot % self.block_size);
        ((block * self.num_kv_heads + head) * self.dim + i) * self.block_size + place
    }
}
