//! `pglobby dev`: everything on this machine, from nothing.

pub mod data_folder;
