//! Graceful drain on SIGTERM and SIGINT.
