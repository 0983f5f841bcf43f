//! (uring)
