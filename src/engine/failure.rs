//! What goes wrong in a step: an error or a panic, and whether the engine can go on after it.
//!
//! Used by the worker for everything it runs.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::model::{self, device};

/// Why a piece of a step did not end well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    /// One sentence.
    pub cause: String,
    /// Whether the device has failed: then everything after it would fail too, or be wrong.
    pub is_fatal: bool,
}

/// Runs a piece of a step among the kernels' threads: from outside, each kernel would wake them and sleep until they are done.
pub(super) fn on_kernel_threads<T: Send>(
    run: impl FnOnce() -> model::Result<T> + Send,
) -> Result<T, Failure> {
    guarded(|| rayon::scope(|_| run()))
}

/// Runs something; a panic in it is an error like any other.
pub(super) fn guarded<T>(run: impl FnOnce() -> model::Result<T>) -> Result<T, Failure> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(outcome) => outcome.map_err(|error| Failure {
            is_fatal: device::is_device_failure(&error),
            cause: device::describe(&error),
        }),
        Err(_) => Err(Failure { cause: "a step panicked".into(), is_fatal: false }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ModelError;

    #[test]
    fn only_an_error_of_the_device_is_fatal_however_deep_it_lies() {
        let failure = |error: ModelError| guarded::<()>(|| Err(error)).unwrap_err();
        assert!(!failure(ModelError::Msg("a request's own".into())).is_fatal);
        let lost = failure(ModelError::Cuda("an illegal memory access".into()).bt().context("decoding"));
        assert!(lost.is_fatal && lost.cause.contains("illegal memory access"), "{lost:?}");
        let full = failure(ModelError::Cuda("DriverError(CUDA_ERROR_OUT_OF_MEMORY)".into()).bt());
        assert!(full.is_fatal && full.cause.starts_with("the GPU has no memory left: "), "{full:?}");
        let panicked = guarded::<()>(|| panic!("a kernel's assertion")).unwrap_err();
        assert_eq!(panicked, Failure { cause: "a step panicked".into(), is_fatal: false });
    }
}
