//! The HTTP side: router, limits and handlers.
