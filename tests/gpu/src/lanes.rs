//! What an instruction does to one lane's registers: bits in, bits out.

use half::{bf16, f16};

use super::block::Row;

/// Of all lanes; what comes of those that take no part is of no account.
pub type Lanewise = fn(&Row, &Row, &Row) -> Row;

/// A function of one lane to one of all.
macro_rules! each {
    (|$a:tt, $b:tt, $c:tt| $value:expr) => {
        |a: &Row, b: &Row, c: &Row| -> Row {
            std::array::from_fn(|lane| {
                let ($a, $b, $c) = (a[lane], b[lane], c[lane]);
                $value
            })
        }
    };
}

trait Float: Copy {
    fn of(bits: u64) -> Self;
    fn bits(self) -> u64;
    fn wide(self) -> f64;
    fn narrow(wide: f64) -> Self;
}

macro_rules! float {
    ($t:ty, $bits:ty, $wide:expr, $narrow:expr) => {
        impl Float for $t {
            fn of(bits: u64) -> Self {
                <$t>::from_bits(bits as $bits)
            }
            fn bits(self) -> u64 {
                u64::from(self.to_bits())
            }
            fn wide(self) -> f64 {
                $wide(self)
            }
            fn narrow(wide: f64) -> Self {
                $narrow(wide)
            }
        }
    };
}
float!(f64, u64, |x| x, |x| x);
float!(f32, u32, f64::from, |x: f64| x as f32);
float!(f16, u16, f16::to_f64, f16::from_f64);
float!(bf16, u16, bf16::to_f64, |x: f64| bf16::from_f32(x as f32));

/// Sums and products of f32, f16 and bf16 in f64 are rounded once more, which changes them in no case that matters here.
fn float_op<T: Float>(name: &str, modifiers: &[&str]) -> Option<Lanewise> {
    use std::cmp::Ordering::{Equal, Greater, Less};
    /// Whether two numbers compare like this; with one that is none they do not.
    macro_rules! when {
        ($order:pat) => {
            each!(|a, b, _| u64::from(matches!(T::of(a).wide().partial_cmp(&T::of(b).wide()), $order)))
        };
    }
    let has = |what: &str| modifiers.contains(&what);
    Some(match name {
        "mov" => each!(|a, _, _| a),
        "add" => each!(|a, b, _| T::narrow(T::of(a).wide() + T::of(b).wide()).bits()),
        "sub" => each!(|a, b, _| T::narrow(T::of(a).wide() - T::of(b).wide()).bits()),
        "mul" => each!(|a, b, _| T::narrow(T::of(a).wide() * T::of(b).wide()).bits()),
        "div" => each!(|a, b, _| T::narrow(T::of(a).wide() / T::of(b).wide()).bits()),
        "fma" | "mad" if has("rm") => each!(|a, b, c| {
            let exact = T::of(a).wide().mul_add(T::of(b).wide(), T::of(c).wide());
            let near = f32::narrow(exact);
            (if f64::from(near) > exact { near.next_down() } else { near }).bits()
        }),
        "fma" | "mad" => {
            each!(|a, b, c| T::narrow(T::of(a).wide().mul_add(T::of(b).wide(), T::of(c).wide())).bits())
        }
        "min" if has("NaN") => each!(|a, b, _| {
            let (x, y) = (T::of(a).wide(), T::of(b).wide());
            T::narrow(if x.is_nan() || y.is_nan() { f64::NAN } else { x.min(y) }).bits()
        }),
        "max" if has("NaN") => each!(|a, b, _| {
            let (x, y) = (T::of(a).wide(), T::of(b).wide());
            T::narrow(if x.is_nan() || y.is_nan() { f64::NAN } else { x.max(y) }).bits()
        }),
        "min" => each!(|a, b, _| T::narrow(T::of(a).wide().min(T::of(b).wide())).bits()),
        "max" => each!(|a, b, _| T::narrow(T::of(a).wide().max(T::of(b).wide())).bits()),
        "abs" => each!(|a, _, _| T::narrow(T::of(a).wide().abs()).bits()),
        "neg" => each!(|a, _, _| T::narrow(-T::of(a).wide()).bits()),
        "copysign" => each!(|a, b, _| T::narrow(T::of(b).wide().copysign(T::of(a).wide())).bits()),
        "sqrt" => each!(|a, _, _| T::narrow(T::of(a).wide().sqrt()).bits()),
        "rsqrt" => each!(|a, _, _| T::narrow(1.0 / T::of(a).wide().sqrt()).bits()),
        "rcp" => each!(|a, _, _| T::narrow(1.0 / T::of(a).wide()).bits()),
        "ex2" => each!(|a, _, _| T::narrow(T::of(a).wide().exp2()).bits()),
        "lg2" => each!(|a, _, _| T::narrow(T::of(a).wide().log2()).bits()),
        "sin" => each!(|a, _, _| T::narrow(T::of(a).wide().sin()).bits()),
        "cos" => each!(|a, _, _| T::narrow(T::of(a).wide().cos()).bits()),
        "tanh" => each!(|a, _, _| T::narrow(T::of(a).wide().tanh()).bits()),
        "setp" => match *modifiers.first()? {
            "eq" => when!(Some(Equal)),
            "ne" => when!(Some(Less | Greater)),
            "lt" => when!(Some(Less)),
            "le" => when!(Some(Less | Equal)),
            "gt" => when!(Some(Greater)),
            "ge" => when!(Some(Greater | Equal)),
            "equ" => when!(None | Some(Equal)),
            "neu" => when!(None | Some(Less | Greater)),
            "ltu" => when!(None | Some(Less)),
            "leu" => when!(None | Some(Less | Equal)),
            "gtu" => when!(None | Some(Greater)),
            "geu" => when!(None | Some(Greater | Equal)),
            "num" => when!(Some(Less | Equal | Greater)),
            "nan" => each!(|a, b, _| u64::from(T::of(a).wide().is_nan() || T::of(b).wide().is_nan())),
            _ => return None,
        },
        _ => return None,
    })
}

macro_rules! integer_op {
    ($name:expr, $modifiers:expr, $t:ty, $u:ty, $wide:ty, $wide_bits:ty) => {{
        let has = |what: &str| $modifiers.contains(&what);
        let function: Lanewise = match $name {
            "mov" => each!(|a, _, _| a as $u as u64),
            "exch" => each!(|_, new, _| new as $u as u64),
            "add" => each!(|a, b, _| (a as $t).wrapping_add(b as $t) as $u as u64),
            "sub" => each!(|a, b, _| (a as $t).wrapping_sub(b as $t) as $u as u64),
            "mul" if has("wide") => {
                each!(|a, b, _| ((a as $t as $wide).wrapping_mul(b as $t as $wide)) as $wide_bits as u64)
            }
            "mul" if has("hi") => {
                each!(|a, b, _| ((a as $t as i128).wrapping_mul(b as $t as i128) >> <$t>::BITS) as $u as u64)
            }
            "mul" => each!(|a, b, _| (a as $t).wrapping_mul(b as $t) as $u as u64),
            "mad" | "fma" if has("wide") => each!(|a, b, c| {
                ((a as $t as $wide).wrapping_mul(b as $t as $wide).wrapping_add(c as $wide)) as $wide_bits
                    as u64
            }),
            "mad" if has("hi") => each!(|a, b, c| {
                (((a as $t as i128).wrapping_mul(b as $t as i128) >> <$t>::BITS) as $u).wrapping_add(c as $u)
                    as u64
            }),
            "mad" => each!(|a, b, c| (a as $t).wrapping_mul(b as $t).wrapping_add(c as $t) as $u as u64),
            "div" => each!(|a, b, _| (a as $t).checked_div(b as $t).unwrap_or(-1i64 as $t) as $u as u64),
            "rem" => each!(|a, b, _| (a as $t).checked_rem(b as $t).unwrap_or(a as $t) as $u as u64),
            "min" => each!(|a, b, _| (a as $t).min(b as $t) as $u as u64),
            "max" => each!(|a, b, _| (a as $t).max(b as $t) as $u as u64),
            "and" => each!(|a, b, _| (a & b) as $u as u64),
            "or" => each!(|a, b, _| (a | b) as $u as u64),
            "xor" => each!(|a, b, _| (a ^ b) as $u as u64),
            "not" => each!(|a, _, _| !a as $u as u64),
            "neg" => each!(|a, _, _| (a as $t).wrapping_neg() as $u as u64),
            "abs" => each!(|a, _, _| {
                (if (a as $t) < (0 as $t) { (a as $t).wrapping_neg() } else { a as $t }) as $u as u64
            }),
            "shl" => each!(|a, b, _| (if b as u32 >= <$t>::BITS { 0 } else { (a as $u) << b as u32 }) as u64),
            "shr" => each!(|a, b, _| {
                ((a as $t) >> (b as u32).min(<$t>::BITS - 1)) as $u as u64
                    * u64::from((b as u32) < <$t>::BITS || <$t>::MIN != 0)
            }),
            "popc" => each!(|a, _, _| (a as $u).count_ones() as u64),
            "clz" => each!(|a, _, _| (a as $u).leading_zeros() as u64),
            "brev" => each!(|a, _, _| (a as $u).reverse_bits() as u64),
            "setp" => match *$modifiers.first()? {
                "eq" => each!(|a, b, _| (a as $t == b as $t) as u64),
                "ne" => each!(|a, b, _| (a as $t != b as $t) as u64),
                "lt" | "lo" => each!(|a, b, _| ((a as $t) < b as $t) as u64),
                "le" | "ls" => each!(|a, b, _| (a as $t <= b as $t) as u64),
                "gt" | "hi" => each!(|a, b, _| (a as $t > b as $t) as u64),
                "ge" | "hs" => each!(|a, b, _| (a as $t >= b as $t) as u64),
                _ => return None,
            },
            _ => return None,
        };
        Some(function)
    }};
}

/// The function of an opcode, `add.rn.f32` in its parts; none where it is unknown, or not of one lane by itself.
pub fn lanewise(parts: &[&str]) -> Option<Lanewise> {
    let (name, modifiers, kind) = (parts[0], &parts[1..], *parts.last()?);
    match name {
        "cvt" => return convert(parts),
        "prmt" => return Some(each!(|a, b, c| permute(a, b, c))),
        "bfi" if kind == "b32" => return Some(each!(|a, b, place| insert::<32>(a, b, place))),
        "bfi" if kind == "b64" => return Some(each!(|a, b, place| insert::<64>(a, b, place))),
        "bfe" if kind == "u32" => return Some(each!(|a, b, c| (a >> b.min(63)) & ((1u64 << c.min(32)) - 1))),
        "shf" if parts.contains(&"wrap") => {
            return Some(if parts.contains(&"l") {
                each!(|a, b, c| (((b << 32 | a) << (c & 31)) >> 32) & 0xffff_ffff)
            } else {
                each!(|a, b, c| ((b << 32 | a) >> (c & 31)) & 0xffff_ffff)
            });
        }
        "dp4a" if parts[1..] == ["s32", "s32"] => {
            return Some(each!(|a, b, c| {
                let byte = |x: u64, i: u32| i32::from((x >> (8 * i)) as u8 as i8);
                (0..4).fold(c as u32 as i32, |sum, i| sum.wrapping_add(byte(a, i) * byte(b, i))) as u32 as u64
            }));
        }
        _ => {}
    }
    if modifiers.iter().any(|modifier| ["sat", "rz", "rp", "cc", "clamp"].contains(modifier)) {
        return None;
    }
    match kind {
        "f64" => float_op::<f64>(name, modifiers),
        "f32" => float_op::<f32>(name, modifiers),
        "f16" => float_op::<f16>(name, modifiers),
        "bf16" => float_op::<bf16>(name, modifiers),
        "u16" | "b16" => integer_op!(name, modifiers, u16, u16, u32, u32),
        "s16" => integer_op!(name, modifiers, i16, u16, i32, u32),
        "u32" | "b32" => integer_op!(name, modifiers, u32, u32, u64, u64),
        "s32" => integer_op!(name, modifiers, i32, u32, i64, u64),
        "u64" | "b64" => integer_op!(name, modifiers, u64, u64, u128, u64),
        "s64" => integer_op!(name, modifiers, i64, u64, i128, u64),
        "pred" => match name {
            "and" => Some(each!(|a, b, _| a & b)),
            "or" => Some(each!(|a, b, _| a | b)),
            "xor" => Some(each!(|a, b, _| a ^ b)),
            "not" => Some(each!(|a, _, _| a ^ 1)),
            "mov" => Some(each!(|a, _, _| a)),
            _ => None,
        },
        _ => None,
    }
}

/// `b` with the lowest bits of `a` from a position on, of so many bits in all. The place has the position, and above it how many.
fn insert<const BITS: u32>(a: u64, b: u64, place: u64) -> u64 {
    let (position, length) = (place as u32, (place >> 32) as u32);
    let ones = |n: u32| u64::MAX.checked_shr(64 - n.min(64)).unwrap_or(0);
    let mask = ones(length).checked_shl(position).unwrap_or(0);
    (b & !mask | a.checked_shl(position).unwrap_or(0) & mask) & ones(BITS)
}

fn permute(a: u64, b: u64, selectors: u64) -> u64 {
    let bytes = (b as u32 as u64) << 32 | a as u32 as u64;
    (0..4).fold(0, |out, i| {
        let selector = (selectors >> (4 * i)) & 0xf;
        let byte = (bytes >> (8 * (selector & 7))) & 0xff;
        let byte = if selector & 8 == 0 {
            byte
        } else if byte & 0x80 == 0 {
            0
        } else {
            0xff
        };
        out | byte << (8 * i)
    })
}

fn pair_bf16(high: u64, low: u64) -> u64 {
    bf16::from_f32(f32::of(high)).bits() << 16 | bf16::from_f32(f32::of(low)).bits()
}
fn pair_f16(high: u64, low: u64) -> u64 {
    f16::from_f32(f32::of(high)).bits() << 16 | f16::from_f32(f32::of(low)).bits()
}

fn convert(parts: &[&str]) -> Option<Lanewise> {
    let (from, to) = (parts[parts.len() - 1], parts[parts.len() - 2]);
    let has = |what: &str| parts.contains(&what);
    macro_rules! from_float {
        ($f:ty) => {{
            let function: Lanewise = match to {
                _ if has("sat") && to == "f32" => {
                    each!(|a, _, _| (f32::narrow(<$f>::of(a).wide()).clamp(0.0, 1.0)).max(0.0).bits())
                }
                "f32" if has("rni") => {
                    each!(|a, _, _| f32::narrow(<$f>::of(a).wide().round_ties_even()).bits())
                }
                "f32" if has("rzi") => each!(|a, _, _| f32::narrow(<$f>::of(a).wide().trunc()).bits()),
                "f32" if has("rmi") => each!(|a, _, _| f32::narrow(<$f>::of(a).wide().floor()).bits()),
                "f32" if has("rpi") => each!(|a, _, _| f32::narrow(<$f>::of(a).wide().ceil()).bits()),
                "f64" if has("rni") => each!(|a, _, _| <$f>::of(a).wide().round_ties_even().bits()),
                "f64" if has("rzi") => each!(|a, _, _| <$f>::of(a).wide().trunc().bits()),
                "f64" if has("rmi") => each!(|a, _, _| <$f>::of(a).wide().floor().bits()),
                "f64" if has("rpi") => each!(|a, _, _| <$f>::of(a).wide().ceil().bits()),
                "f64" => each!(|a, _, _| <$f>::of(a).wide().bits()),
                "f32" => each!(|a, _, _| f32::narrow(<$f>::of(a).wide()).bits()),
                "f16" => each!(|a, _, _| f16::narrow(<$f>::of(a).wide()).bits()),
                "bf16" => each!(|a, _, _| bf16::narrow(<$f>::of(a).wide()).bits()),
                "s64" if has("rni") => each!(|a, _, _| <$f>::of(a).wide().round_ties_even() as i64 as u64),
                "s32" if has("rni") => {
                    each!(|a, _, _| <$f>::of(a).wide().round_ties_even() as i32 as u32 as u64)
                }
                "s32" if has("rmi") => each!(|a, _, _| <$f>::of(a).wide().floor() as i32 as u32 as u64),
                "s64" if has("rmi") => each!(|a, _, _| <$f>::of(a).wide().floor() as i64 as u64),
                "s16" if has("rni") => {
                    each!(|a, _, _| <$f>::of(a).wide().round_ties_even() as i16 as u16 as u64)
                }
                _ if has("rni") || has("rmi") || has("rpi") => return None,
                "u8" => each!(|a, _, _| <$f>::of(a).wide() as u8 as u64),
                "u16" => each!(|a, _, _| <$f>::of(a).wide() as u16 as u64),
                "u32" => each!(|a, _, _| <$f>::of(a).wide() as u32 as u64),
                "u64" => each!(|a, _, _| <$f>::of(a).wide() as u64),
                "s8" => each!(|a, _, _| <$f>::of(a).wide() as i8 as u8 as u64),
                "s16" => each!(|a, _, _| <$f>::of(a).wide() as i16 as u16 as u64),
                "s32" => each!(|a, _, _| <$f>::of(a).wide() as i32 as u32 as u64),
                "s64" => each!(|a, _, _| <$f>::of(a).wide() as i64 as u64),
                _ => return None,
            };
            Some(function)
        }};
    }
    macro_rules! from_integer {
        ($i:ty) => {{
            let function: Lanewise = match to {
                "f64" => each!(|a, _, _| (a as $i as f64).bits()),
                "f32" => each!(|a, _, _| (a as $i as f32).bits()),
                "f16" => each!(|a, _, _| f16::narrow(a as $i as f64).bits()),
                "bf16" => each!(|a, _, _| bf16::narrow(a as $i as f64).bits()),
                "u8" | "s8" if has("sat") => return None,
                "u8" | "b8" => each!(|a, _, _| a as $i as u8 as u64),
                // A byte in a wider register keeps its sign there.
                "s8" => each!(|a, _, _| a as $i as i8 as i16 as u16 as u64),
                "u16" | "s16" | "b16" => each!(|a, _, _| a as $i as u16 as u64),
                "u32" | "s32" | "b32" => each!(|a, _, _| a as $i as u32 as u64),
                "u64" | "s64" | "b64" => each!(|a, _, _| a as $i as u64),
                _ => return None,
            };
            Some(function)
        }};
    }
    match (to, from) {
        ("bf16x2", "f32") => return Some(each!(|a, b, _| pair_bf16(a, b))),
        ("f16x2", "f32") => return Some(each!(|a, b, _| pair_f16(a, b))),
        _ => {}
    }
    match from {
        "f64" => from_float!(f64),
        "f32" => from_float!(f32),
        "f16" => from_float!(f16),
        "bf16" => from_float!(bf16),
        "u8" => from_integer!(u8),
        "u16" => from_integer!(u16),
        "u32" => from_integer!(u32),
        "u64" => from_integer!(u64),
        "s8" => from_integer!(i8),
        "s16" => from_integer!(i16),
        "s32" => from_integer!(i32),
        "s64" => from_integer!(i64),
        _ => None,
    }
}
