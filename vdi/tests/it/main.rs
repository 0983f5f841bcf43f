//! A whole VDI over the real writers, with disks in memory.

mod background;
mod cut;
mod disk;
mod model;
mod world;
