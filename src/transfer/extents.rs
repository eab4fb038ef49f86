//! [`Extents`]: a set of byte ranges.

use std::collections::BTreeMap;
use std::ops::Range;

/// A set of bytes, stored as ranges that neither overlap nor touch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Extents {
    /// The end of each range by its start.
    ranges: BTreeMap<u64, u64>,
    bytes: u64,
}

impl Extents {
    pub(crate) fn whole(size: u64) -> Self {
        let mut all = Self::default();
        all.insert(0..size);
        all
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The ranges in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.ranges.iter().map(|(&start, &end)| start..end)
    }

    /// The parts of a range that are in the set, in order.
    pub(crate) fn parts_of(&self, of: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let before = self.ranges.range(..of.start).next_back();
        let inside = self.ranges.range(of.start..of.end.max(of.start));
        let ranges = before.into_iter().chain(inside);
        ranges
            .map(move |(&start, &end)| start.max(of.start)..end.min(of.end))
            .filter(|part| !part.is_empty())
    }

    pub(crate) fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let Range { mut start, mut end } = range;
        if let Some((&at, &until)) = self.ranges.range(..=start).next_back()
            && until >= start
        {
            start = at;
            end = end.max(until);
        }
        while let Some((&at, &until)) = self.ranges.range(start..=end).next() {
            self.ranges.remove(&at);
            self.bytes -= until - at;
            end = end.max(until);
        }
        self.ranges.insert(start, end);
        self.bytes += end - start;
    }

    pub(crate) fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let before = self.ranges.range(..range.start).next_back();
        if let Some((&at, &until)) = before
            && until > range.start
        {
            self.ranges.insert(at, range.start);
            self.bytes -= until - range.start;
            if until > range.end {
                self.ranges.insert(range.end, until);
                self.bytes += until - range.end;
                return;
            }
        }
        while let Some((&at, &until)) = self.ranges.range(range.clone()).next() {
            self.ranges.remove(&at);
            self.bytes -= until - at;
            if until > range.end {
                self.ranges.insert(range.end, until);
                self.bytes += until - range.end;
            }
        }
    }

    pub(crate) fn extend(&mut self, other: &Self) {
        other.iter().for_each(|range| self.insert(range));
    }

    /// The bytes in `self` that are not in `other`.
    pub(crate) fn minus(&self, other: &Self) -> Self {
        let mut rest = self.clone();
        other.iter().for_each(|range| rest.remove(range));
        rest
    }

    /// The bytes in both sets.
    pub(crate) fn within(&self, other: &Self) -> Self {
        self.minus(&self.minus(other))
    }

    /// The set extended to borders of `grain` and the end of the disk.
    pub(crate) fn on_grains(&self, grain: u64, size: u64) -> Self {
        let rounded = self.iter().map(|r| {
            let end = r.end.checked_next_multiple_of(grain).unwrap_or(u64::MAX);
            r.start / grain * grain..end.min(size)
        });
        rounded.collect()
    }
}

impl FromIterator<Range<u64>> for Extents {
    fn from_iter<T: IntoIterator<Item = Range<u64>>>(ranges: T) -> Self {
        let mut set = Self::default();
        ranges.into_iter().for_each(|range| set.insert(range));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Verified against one bool for each byte.
    #[test]
    fn sets_do_what_sets_of_bytes_do() {
        const SIZE: usize = 200;
        let mut random = 7u64;
        let mut next = |limit: u64| {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (random >> 33) % limit
        };
        let mut set = Extents::default();
        let mut bytes = vec![false; SIZE];
        for round in 0..5000 {
            let start = next(SIZE as u64);
            let end = start + next(SIZE as u64 - start + 1).min(20);
            let insert = next(2) == 0;
            if insert {
                set.insert(start..end);
            } else {
                set.remove(start..end);
            }
            bytes[start as usize..end as usize].fill(insert);
            let mut seen = vec![false; SIZE];
            let mut last = None;
            for range in set.iter() {
                assert!(last.is_none_or(|end| end < range.start), "{round}: {set:?}");
                last = Some(range.end);
                seen[range.start as usize..range.end as usize].fill(true);
            }
            assert_eq!(seen, bytes, "{round}");
            let part = next(SIZE as u64)..next(SIZE as u64);
            let mut inside = [false; SIZE];
            set.parts_of(part.clone())
                .for_each(|r| inside[r.start as usize..r.end as usize].fill(true));
            for (at, inside) in inside.iter().enumerate() {
                assert_eq!(*inside, bytes[at] && part.contains(&(at as u64)), "{round}");
            }
            let count = bytes.iter().filter(|b| **b).count() as u64;
            assert_eq!(set.bytes(), count, "{round}");
        }
        let other: Extents = [10..60, 90..91].into_iter().collect();
        let both = set.within(&other);
        let mut all = set.minus(&other);
        assert_eq!(both.bytes() + all.bytes(), set.bytes());
        all.extend(&both);
        assert_eq!(all, set);
    }
}
