//! Links between hosts, cut.

use anyhow::Result;

use crate::network::HOSTS;
use crate::table::{PAIRS, WAYS};
use crate::world::World;

pub fn cut_both_ways(world: &mut World, pair: usize) -> Result<()> {
    let (one, other) = PAIRS[pair];
    cut(world, &[(one, other), (other, one)])
}

pub fn cut_one_way(world: &mut World, way: usize) -> Result<()> {
    cut(world, &[WAYS[way]])
}

fn others(host: usize) -> impl Iterator<Item = usize> {
    (0..HOSTS).filter(move |other| *other != host)
}

pub fn hears_nobody(world: &mut World, host: usize) -> Result<()> {
    let ways: Vec<(usize, usize)> = others(host).map(|other| (other, host)).collect();
    cut(world, &ways)
}

pub fn heard_by_nobody(world: &mut World, host: usize) -> Result<()> {
    let ways: Vec<(usize, usize)> = others(host).map(|other| (host, other)).collect();
    cut(world, &ways)
}

pub fn cut_off(world: &mut World, host: usize) -> Result<()> {
    let ways: Vec<(usize, usize)> = others(host)
        .flat_map(|other| [(host, other), (other, host)])
        .collect();
    cut(world, &ways)
}

pub fn pull_cable(world: &mut World, host: usize) -> Result<()> {
    let said = logs(world);
    world.network.plug(host, false)?;
    until_given_up(world, &said, host)
}

/// Cuts the ways, from one host to another each, until those that hear nothing any more have given their links up.
fn cut(world: &mut World, ways: &[(usize, usize)]) -> Result<()> {
    let said = logs(world);
    for (from, to) in ways {
        world.network.cut(*from, *to)?;
    }
    ways.iter()
        .try_for_each(|(_, to)| until_given_up(world, &said, *to))
}

fn logs(world: &World) -> Vec<usize> {
    world.hosts.iter().map(|host| host.log().len()).collect()
}

fn until_given_up(world: &mut World, said: &[usize], host: usize) -> Result<()> {
    world.until("a link is given up", |world| {
        Ok(world.hosts[host].log()[said[host]..].contains("link ended"))
    })
}

pub fn mend(world: &mut World, _: usize) -> Result<()> {
    world.network.mend()
}

pub fn put_cable_back(world: &mut World, host: usize) -> Result<()> {
    world.network.plug(host, true)
}
