//! A binary heap of entities, out of whose middle one can be taken.
//!
//! Each entity stands in it at most once. A table by entity says where, so that removal costs the logarithm of the
//! length like the other operations. Nothing is allocated while the entities' numbers stay below the capacity.

use alloc::vec::Vec;

use crate::EntityId;

/// It is not in the heap.
const NOWHERE: u32 = u32::MAX;
/// It is the least one.
const FIRST: u32 = u32::MAX - 1;

/// Entities in order of a key, least first. Entities of equal keys come in no particular order.
#[derive(Debug)]
pub(crate) struct KeyedHeap<K> {
    /// The least, kept apart: to put one in and take it out again is next to nothing where there is no other.
    first: Option<(K, EntityId)>,
    /// The others, a binary heap. Empty if there is no first.
    others: Vec<(K, EntityId)>,
    /// By entity: [`FIRST`], or its place in `others`.
    places: Vec<u32>,
}

impl<K: Copy + Ord> KeyedHeap<K> {
    /// An empty heap with room for `capacity` entities.
    pub(crate) fn new(capacity: usize) -> Self {
        KeyedHeap {
            first: None,
            others: Vec::with_capacity(capacity),
            places: alloc::vec![NOWHERE; capacity],
        }
    }

    /// The least key and its entity.
    #[inline(always)]
    pub(crate) fn peek(&self) -> Option<(K, EntityId)> {
        self.first
    }

    /// Puts an entity in, in place of its earlier key if it is there.
    #[inline(always)]
    pub(crate) fn push(&mut self, id: EntityId, key: K) {
        match self.places.get(id.index()) {
            Some(&NOWHERE) => {}
            Some(_) => {
                self.remove(id);
            }
            None => self.places.resize(id.index() + 1, NOWHERE),
        }
        match self.first {
            None => self.set_first(id, key),
            Some((least, _)) if least <= key => self.push_other(id, key),
            Some((least, before)) => {
                self.set_first(id, key);
                self.push_other(before, least);
            }
        }
    }

    /// Takes the entity with the least key out.
    #[inline(always)]
    pub(crate) fn pop(&mut self) -> Option<(K, EntityId)> {
        let first = self.first.take()?;
        self.places[first.1.index()] = NOWHERE;
        if !self.others.is_empty() {
            let (key, id) = self.others[0];
            self.take(0);
            self.set_first(id, key);
        }
        Some(first)
    }

    /// Takes the only entity out; `None`: there is none, or there are others.
    #[inline(always)]
    pub(crate) fn pop_only(&mut self) -> Option<EntityId> {
        if !self.others.is_empty() {
            return None;
        }
        self.pop().map(|(_, id)| id)
    }

    /// Takes an entity out; its key, if it was there.
    pub(crate) fn remove(&mut self, id: EntityId) -> Option<K> {
        match *self.places.get(id.index())? {
            NOWHERE => None,
            FIRST => self.pop().map(|(key, _)| key),
            place => {
                let key = self.others[place as usize].0;
                self.take(place as usize);
                Some(key)
            }
        }
    }

    fn set_first(&mut self, id: EntityId, key: K) {
        self.first = Some((key, id));
        self.places[id.index()] = FIRST;
    }

    #[inline(never)]
    fn push_other(&mut self, id: EntityId, key: K) {
        let place = self.others.len();
        self.others.push((key, id));
        self.up(place);
    }

    /// Takes one of the others out.
    #[inline(never)]
    fn take(&mut self, place: usize) {
        let (_, id) = self.others.swap_remove(place);
        self.places[id.index()] = NOWHERE;
        if place < self.others.len() {
            self.down(place);
            self.up(place);
        }
    }

    fn set(&mut self, place: usize, item: (K, EntityId)) {
        self.others[place] = item;
        self.places[item.1.index()] = place as u32;
    }

    /// Moves the one in this place towards the front as far as it has to go.
    fn up(&mut self, mut place: usize) {
        let item = self.others[place];
        while place > 0 {
            let parent = (place - 1) / 2;
            if self.others[parent].0 <= item.0 {
                break;
            }
            self.set(place, self.others[parent]);
            place = parent;
        }
        self.set(place, item);
    }

    /// Moves the one in this place towards the end as far as it has to go.
    fn down(&mut self, mut place: usize) {
        let item = self.others[place];
        loop {
            let mut child = 2 * place + 1;
            if child + 1 < self.others.len() && self.others[child + 1].0 < self.others[child].0 {
                child += 1;
            }
            if child >= self.others.len() || item.0 <= self.others[child].0 {
                break;
            }
            self.set(place, self.others[child]);
            place = child;
        }
        self.set(place, item);
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
                prop_assert_eq!(usize::from(heap.first.is_some()) + heap.others.len(), model.len());
                let least = model.iter().map(|(&id, &key)| (key, id)).min();
                prop_assert_eq!(heap.peek().map(|(key, _)| key), least);
            }
        }
    }
}
