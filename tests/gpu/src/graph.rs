//! Work of the stream, done at once or kept in a recording.

use std::{fmt, sync::Arc};

use super::{early::Unfinished, memory::Memory};

/// What work sees of the device.
#[derive(Debug, Default)]
pub struct State {
    pub memory: Memory,
    pub unfinished: Unfinished,
}

type Work = Arc<dyn Fn(&mut State) -> Result<(), String> + Send + Sync>;

#[derive(Clone)]
pub enum Node {
    Kernel(Work),
    Copy(Work),
    Set(Work),
    Allocate(u64),
    Free(u64),
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node of kind {}", self.kind())
    }
}

impl Node {
    /// `CUgraphNodeType`
    pub fn kind(&self) -> u32 {
        match self {
            Node::Kernel(_) => 0,
            Node::Copy(_) => 1,
            Node::Set(_) => 2,
            Node::Allocate(_) => 10,
            Node::Free(_) => 11,
        }
    }

    pub fn run(&self, state: &mut State) -> Result<(), String> {
        match self {
            Node::Kernel(work) => work(state),
            Node::Copy(work) | Node::Set(work) => {
                state.unfinished.begin(false);
                work(state)
            }
            Node::Allocate(at) => {
                state.memory.set_live(*at, true);
                Ok(())
            }
            Node::Free(at) => {
                state.memory.set_live(*at, false);
                Ok(())
            }
        }
    }
}

/// A recording.
#[derive(Debug, Default, Clone)]
pub struct Graph {
    pub nodes: Vec<Node>,
}
