//! Who shares a pCPU, summed up: for the division of entities among pCPUs.
//!
//! Each entity has had some CPU time of late, and is due a share. What it has had by its share is its *wealth*; in a fair host all
//! are equally wealthy. The entities of one pCPU gain wealth at the same rate, which is 1 / (sum of their shares). So the sum
//! over all entities of share x wealth^2, which is to be small, changes by the sum over the pCPUs of (CPU time that
//! their entities have had / sum of their shares), and that again, as time goes on, by the sum of 1 / (sum of shares). A pCPU's part of both,
//! looking some time ahead, is its *unrest*. To move an entity is right if that makes the sum of the two pCPUs' unrest less: it brings
//! together rich and poor, and spreads shares evenly. Where shares cannot be spread evenly, the unevenness moves around that
//! way, so that in the long run all get their part.

use crate::entity::{MILLION, Recent};

/// The entities that run or wait on a pCPU, without those that have reserved.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Crowd {
    /// Sum of their shares.
    share: u64,
    /// CPU time that they have had of late, wherever.
    spent: Recent,
}

impl Crowd {
    /// Sum of the shares.
    pub(crate) fn share(&self) -> u64 {
        self.share
    }

    /// One comes, with its share and what it has had.
    pub(crate) fn join(&mut self, share: u64, had: Recent, now: u64) {
        if share > 0 {
            self.share += share;
            self.spent.add(had.at(now), now);
        }
    }

    /// One goes.
    pub(crate) fn leave(&mut self, share: u64, had: Recent, now: u64) {
        self.share = self.share.saturating_sub(share);
        if self.share == 0 {
            // What is left is what halving has rounded.
            self.spent = Recent::default();
        } else if share > 0 {
            self.spent.remove(had.at(now), now);
        }
    }

    /// One that has this share has run.
    pub(crate) fn charge(&mut self, share: u64, ran: u64, now: u64) {
        if share > 0 {
            self.spent.add(ran, now);
        }
    }

    /// The pCPU's unrest, looking `ahead` by so many ticks, when so many millionths of it are reserved.
    pub(crate) fn unrest(&self, reserved: u64, ahead: u64, now: u64) -> u128 {
        let free = u128::from(MILLION.saturating_sub(reserved));
        let spent = u128::from(self.spent.at(now)) * u128::from(MILLION);
        (spent + free * u128::from(ahead / 2))
            .saturating_mul(free)
            .checked_div(u128::from(self.share))
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Entities of these shares and times had.
    fn crowd(entities: &[(u64, u64)]) -> Crowd {
        let mut crowd = Crowd::default();
        for &(share, ticks) in entities {
            let mut had = Recent::default();
            had.add(ticks, 0);
            crowd.join(share, had, 0);
        }
        crowd
    }

    fn unrest(one: &[(u64, u64)], other: &[(u64, u64)]) -> u128 {
        crowd(one).unrest(0, 100, 0) + crowd(other).unrest(0, 100, 0)
    }

    #[test]
    fn shares_are_spread() {
        let e = (100, 1000);
        assert!(unrest(&[e, e], &[e, e]) < unrest(&[e, e, e], &[e]));
        assert!(unrest(&[e, e, e], &[e, e]) < unrest(&[e, e, e, e], &[e]));
    }

    #[test]
    fn the_poor_get_the_place_where_there_is_more() {
        let (rich, poor) = ((100, 9000), (100, 1000));
        // One has a pCPU for itself.
        assert!(unrest(&[rich, rich], &[poor]) < unrest(&[rich, poor], &[rich]));
        // A little difference is not worth a move.
        let nearly = (100, 1010);
        assert!(unrest(&[nearly, poor], &[poor, poor]) < unrest(&[nearly], &[poor, poor, poor]));
    }

    #[test]
    fn who_has_gone_leaves_nothing() {
        let mut crowd = crowd(&[(3, 1001), (4, 77)]);
        let mut had = Recent::default();
        had.add(77, 0);
        crowd.leave(4, had, 1 << 33);
        assert_eq!(crowd.share(), 3);
        crowd.leave(3, Recent::default(), 1 << 33);
        assert_eq!(crowd.unrest(0, 100, 1 << 33), 0);
    }
}
