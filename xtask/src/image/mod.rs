mod disk;
mod symbols;
