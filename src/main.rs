//! The `tinyllava` binary: see [`tinyllava::cli`].

fn main() {}
