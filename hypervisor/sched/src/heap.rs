//! A binary heap of entities, out of whose middle one can be taken.
//!
//! Each entity stands in it at most once. A table by entity says where, so that removal costs the logarithm of the
//! length like the other operations. Nothing is allocated while the entities' numbers stay below the capacity.

use alloc::vec::Vec;

use crate::EntityId;

const NOWHERE: u32 = u32::MAX;

/// Entities in order of a key, least first. Entities of equal keys come in no particular order.
#[derive(Debug)]
pub(crate) struct KeyedHeap<K> {
    items: Vec<(K, EntityId)>,
    /// By entity: its place in `items`.
    places: Vec<u32>,
}

impl<K: Copy + Ord> KeyedHeap<K> {
    /// An empty heap with room for `capacity` entities.
    pub(crate) fn new(capacity: usize) -> Self {
        KeyedHeap {
            items: Vec::with_capacity(capacity),
            places: alloc::vec![NOWHERE; capacity],
        }
    }

    /// The least key and its entity.
    pub(crate) fn peek(&self) -> Option<(K, EntityId)> {
        self.items.first().copied()
    }

    /// Puts an entity in, in place of its earlier key if it is there.
    pub(crate) fn push(&mut self, id: EntityId, key: K) {
        self.remove(id);
        if self.places.len() <= id.index() {
            self.places.resize(id.index() + 1, NOWHERE);
        }
        let place = self.items.len();
        self.items.push((key, id));
        self.places[id.index()] = place as u32;
        self.up(place);
    }

    /// Takes the entity with the least key out.
    pub(crate) fn pop(&mut self) -> Option<(K, EntityId)> {
        let first = *self.items.first()?;
        self.take(0);
        Some(first)
    }

    /// Takes an entity out; its key, if it was there.
    pub(crate) fn remove(&mut self, id: EntityId) -> Option<K> {
        let place = *self.places.get(id.index())?;
        if place == NOWHERE {
            return None;
        }
        let key = self.items[place as usize].0;
        self.take(place as usize);
        Some(key)
    }

    fn take(&mut self, place: usize) {
        let (_, id) = self.items.swap_remove(place);
        self.places[id.index()] = NOWHERE;
        if let Some(&(_, moved)) = self.items.get(place) {
            self.places[moved.index()] = place as u32;
            self.down(place);
            self.up(place);
        }
    }

    fn swap(&mut self, a: usize, b: usize) {
        self.items.swap(a, b);
        self.places[self.items[a].1.index()] = a as u32;
        self.places[self.items[b].1.index()] = b as u32;
    }

    fn up(&mut self, mut place: usize) {
        while place > 0 {
            let parent = (place - 1) / 2;
            if self.items[parent].0 <= self.items[place].0 {
                return;
            }
            self.swap(parent, place);
            place = parent;
        }
    }

    fn down(&mut self, mut place: usize) {
        loop {
            let mut least = place;
            for child in [2 * place + 1, 2 * place + 2] {
                if child < self.items.len() && self.items[child].0 < self.items[least].0 {
                    least = child;
                }
            }
            if least == place {
                return;
            }
            self.swap(least, place);
            place = least;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeMap;
    use proptest::prelude::*;

    proptest! {
        /// Whatever is put in and taken out, the heap is a sorted map.
        #[test]
        fn follows_the_model(ops in proptest::collection::vec((0u8..4, 0u32..12, 0u32..8), 1..300)) {
            let mut heap = KeyedHeap::new(4);
            let mut model = BTreeMap::new();
            for (op, id, key) in ops {
                match op {
                    0 | 1 => {
                        heap.push(EntityId(id), (key, id));
                        model.insert(id, key);
                    }
                    2 => {
                        let key = heap.remove(EntityId(id)).map(|(key, _)| key);
                        prop_assert_eq!(key, model.remove(&id));
                    }
                    _ => {
                        let least = model.iter().map(|(&id, &key)| (key, id)).min();
                        prop_assert_eq!(heap.pop().map(|(key, _)| key), least);
                        if let Some((_, id)) = least {
                            model.remove(&id);
                        }
                    }
                }
                prop_assert_eq!(heap.items.len(), model.len());
                let least = model.iter().map(|(&id, &key)| (key, id)).min();
                prop_assert_eq!(heap.peek().map(|(key, _)| key), least);
            }
        }
    }
}
