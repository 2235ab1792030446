//! A byte queue of fixed size, for serial input and output.

/// First-in first-out queue of up to `N` bytes. `N` must not be 0.
pub struct ByteQueue<const N: usize> {
    bytes: [u8; N],
    /// Index of the oldest byte.
    head: usize,
    length: usize,
}

impl<const N: usize> ByteQueue<N> {
    /// An empty queue.
    pub const fn new() -> Self {
        const { assert!(N > 0) };
        ByteQueue {
            bytes: [0; N],
            head: 0,
            length: 0,
        }
    }

    /// Appends a byte. `false`: the queue is full and the byte was not taken.
    #[must_use]
    pub fn push(&mut self, byte: u8) -> bool {
        if self.length == N {
            return false;
        }
        self.bytes[(self.head + self.length) % N] = byte;
        self.length += 1;
        true
    }

    /// Appends as many of `bytes` as fit. Returns how many.
    pub fn extend(&mut self, bytes: &[u8]) -> usize {
        bytes.iter().take_while(|&&byte| self.push(byte)).count()
    }

    /// Takes the oldest byte.
    pub fn pop(&mut self) -> Option<u8> {
        let byte = *self.front().first()?;
        self.consume(1);
        Some(byte)
    }

    /// The oldest bytes, as far as they lie in one piece. Empty only when the queue is.
    pub fn front(&self) -> &[u8] {
        &self.bytes[self.head..(self.head + self.length).min(N)]
    }

    /// Drops the `count` oldest bytes, or all if there are fewer.
    pub fn consume(&mut self, count: usize) {
        let count = count.min(self.length);
        self.head = (self.head + count) % N;
        self.length -= count;
    }

    /// Bytes waiting.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }
}

impl<const N: usize> Default for ByteQueue<N> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Step {
        Extend(Vec<u8>),
        Pop,
        ConsumeFront(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            prop::collection::vec(any::<u8>(), 0..7).prop_map(Step::Extend),
            Just(Step::Pop),
            (0usize..7).prop_map(Step::ConsumeFront),
        ]
    }

    proptest! {
        #[test]
        fn behaves_as_a_bounded_deque(steps in prop::collection::vec(step(), 0..60)) {
            const N: usize = 5;
            let mut queue = ByteQueue::<N>::new();
            let mut model = VecDeque::new();
            for step in steps {
                match step {
                    Step::Extend(bytes) => {
                        let fits = bytes.len().min(N - model.len());
                        prop_assert_eq!(queue.extend(&bytes), fits);
                        model.extend(&bytes[..fits]);
                    }
                    Step::Pop => prop_assert_eq!(queue.pop(), model.pop_front()),
                    Step::ConsumeFront(wanted) => {
                        let front = queue.front().to_vec();
                        prop_assert_eq!(front.is_empty(), model.is_empty());
                        prop_assert!(front.iter().eq(model.iter().take(front.len())));
                        queue.consume(wanted);
                        model.drain(..wanted.min(model.len()));
                    }
                }
                prop_assert_eq!(queue.len(), model.len());
            }
        }
    }
}
