//! A guest's time-stamp counter at a rate of its own: the one conversion that all time of a VM takes.
//!
//! With TSC scaling the processor shows a guest `(host TSC * multiplier >> shift) + offset` wherever the guest
//! reads its TSC (SDM vol. 3C, section 26.3; APM vol. 2, section 15.30.5). [`TscScale`] is that product, to the
//! tick, so that what the host computes for a VM is what the guest reads; without scaling it changes nothing.
//!
//! Not here: the offset, which is the VM's (`VirtualCpu::set_tsc_offset`).

/// What a processor's TSC scaling can do: a fixed-point factor of so many bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscScaling {
    /// Bits behind the point.
    pub fraction_bits: u8,
    /// Bits before it.
    pub integer_bits: u8,
}

impl TscScaling {
    /// The TSC multiplier of VT-x (SDM vol. 3C, section 25.6.5).
    pub const VTX: TscScaling = TscScaling {
        fraction_bits: 48,
        integer_bits: 16,
    };
    /// TSC_RATIO of AMD-V (APM vol. 2, section 15.30.5).
    pub const AMD_V: TscScaling = TscScaling {
        fraction_bits: 32,
        integer_bits: 8,
    };

    /// The factor, rounded to the nearest, that makes a TSC of `host_hz` look like one of `guest_hz`; `None`
    /// where it has too few bits, or a rate is 0.
    pub fn scale(self, host_hz: u64, guest_hz: u64) -> Option<TscScale> {
        let host = u128::from(host_hz);
        let wanted = (u128::from(guest_hz) << self.fraction_bits).checked_add(host / 2)?;
        let multiplier = u64::try_from(wanted.checked_div(host)?).ok()?;
        let bits = u32::from(self.fraction_bits) + u32::from(self.integer_bits);
        let fits = multiplier != 0 && u64::BITS - multiplier.leading_zeros() <= bits;
        fits.then_some(TscScale {
            multiplier,
            shift: self.fraction_bits,
        })
    }
}

/// What a guest's TSC counts per tick of the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscScale {
    multiplier: u64,
    /// Bits of the multiplier behind the point; 0: the guest's TSC has the host's rate.
    shift: u8,
}

impl TscScale {
    /// The host's own rate.
    pub const SAME: TscScale = TscScale {
        multiplier: 1,
        shift: 0,
    };

    /// The factor in the form of the hardware that it was made for; `None`: the host's own rate.
    pub const fn multiplier(self) -> Option<u64> {
        if self.shift == 0 {
            None
        } else {
            Some(self.multiplier)
        }
    }

    /// What a guest's TSC without offset shows when the host's shows `host`, wrapping as the processor wraps it.
    #[inline]
    pub const fn to_guest(self, host: u64) -> u64 {
        if self.shift == 0 {
            return host;
        }
        ((host as u128 * self.multiplier as u128) >> self.shift) as u64
    }

    /// The first value of the host's TSC for which [`TscScale::to_guest`] is at least `guest`; saturating.
    #[inline]
    pub fn to_host(self, guest: u64) -> u64 {
        if self.shift == 0 {
            return guest;
        }
        let host = (u128::from(guest) << self.shift).div_ceil(u128::from(self.multiplier.max(1)));
        u64::try_from(host).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_hosts_own_rate_changes_nothing() {
        for ticks in [0, 1, 1 << 40, u64::MAX] {
            assert_eq!(TscScale::SAME.to_guest(ticks), ticks);
            assert_eq!(TscScale::SAME.to_host(ticks), ticks);
        }
        assert_eq!(TscScale::SAME.multiplier(), None);
    }

    #[test]
    fn factors_are_those_of_the_manuals() {
        let twice = TscScaling::VTX.scale(1_000_000_000, 2_000_000_000);
        assert_eq!(twice.and_then(TscScale::multiplier), Some(2 << 48));
        let half = TscScaling::AMD_V.scale(3_000_000_000, 1_500_000_000);
        assert_eq!(half.and_then(TscScale::multiplier), Some(1 << 31));
        // The same rate by hardware that scales is a factor of one, and still scales.
        let one = TscScaling::AMD_V.scale(5, 5).expect("a factor");
        assert_eq!(one.multiplier(), Some(1 << 32));
        assert_eq!(one.to_guest(u64::MAX), u64::MAX);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(TscScaling::AMD_V.scale(1, 255).is_some());
        assert_eq!(TscScaling::AMD_V.scale(1, 256), None);
        assert!(TscScaling::VTX.scale(1, 65_535).is_some());
        assert_eq!(TscScaling::VTX.scale(1, 65_536), None);
        assert_eq!(TscScaling::VTX.scale(0, 1), None);
        assert_eq!(TscScaling::VTX.scale(1, 0), None);
        assert_eq!(TscScaling::VTX.scale(u64::MAX, 1), None, "rounds to 0");
    }

    proptest! {
        #[test]
        fn the_way_back_is_the_first_tick_that_shows_it(
            host_hz in 100_000_000u64..6_000_000_000,
            guest_hz in 100_000_000u64..6_000_000_000,
            guest in 1u64..1 << 58,
            amd in any::<bool>(),
        ) {
            let scaling = if amd { TscScaling::AMD_V } else { TscScaling::VTX };
            let scale = scaling.scale(host_hz, guest_hz).expect("in range");
            let host = scale.to_host(guest);
            prop_assert!(scale.to_guest(host) >= guest);
            prop_assert!(scale.to_guest(host - 1) < guest);
        }

        #[test]
        fn a_year_is_off_by_less_than_half_a_second(
            host_hz in 100_000_000u64..6_000_000_000,
            guest_hz in 100_000_000u64..6_000_000_000,
            amd in any::<bool>(),
        ) {
            let scaling = if amd { TscScaling::AMD_V } else { TscScaling::VTX };
            let scale = scaling.scale(host_hz, guest_hz).expect("in range");
            let seconds = 31_557_600;
            let shown = scale.to_guest(host_hz * seconds);
            // Half a unit of 2^-32 of the factor, relative to a factor of 1/60 at least.
            let error = shown.abs_diff(guest_hz * seconds);
            prop_assert!(error <= guest_hz / 2, "{error} of {guest_hz}");
        }
    }
}
