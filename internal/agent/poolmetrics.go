package agent

import (
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fathom-network/fathom/internal/facts/ipam"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/kernel/lease"
)

// poolCollector collects how full the node's ranges and blocks are. It reads them at each scrape: the plugin gives addresses out
// without the agent.
type poolCollector struct {
	read func() ([]ipam.Pool, []ipam.Usage, error)
}

var (
	poolAddresses = prometheus.NewDesc("fathom_agent_pool_addresses",
		"Addresses that the node has of a pool: all that pods can have (size), those in use (in_use) and those that rest (cooling).",
		[]string{"pool", "family", "state"}, nil)
	poolBlocks = prometheus.NewDesc("fathom_agent_pool_blocks",
		"Blocks that the node has of an IPPool; fixed ones are single addresses that pods asked for.", []string{"pool", "fixed"}, nil)
)

// readPools reads the node's ranges and blocks, and their usage.
func (a *Agent) readPools() ([]ipam.Pool, []ipam.Usage, error) {
	store, err := lease.Open(a.Paths.Leases, a.state.get().Config.CoolDown)
	if err != nil {
		return nil, nil, err
	}
	state, err := store.Look()
	if err != nil {
		return nil, nil, err
	}
	pools := append(a.readConflist().Pools, state.Pools...)
	usage, err := store.Usage(pools)
	return pools, usage, err
}

// Describe implements prometheus.Collector.
func (c poolCollector) Describe(d chan<- *prometheus.Desc) { d <- poolAddresses; d <- poolBlocks }

// Collect implements prometheus.Collector.
func (c poolCollector) Collect(m chan<- prometheus.Metric) {
	pools, usage, err := c.read()
	if err != nil {
		m <- prometheus.NewInvalidMetric(poolAddresses, err)
		return
	}
	for _, u := range usage {
		family := strings.ToLower(u.Family.String())
		for state, n := range map[string]uint64{"size": u.Size, "in_use": u.InUse, "cooling": u.Cooling} {
			m <- prometheus.MustNewConstMetric(poolAddresses, prometheus.GaugeValue, float64(n), u.Pool, family, state)
		}
	}
	for _, p := range pools {
		if p.Name == netconf.DefaultPool {
			continue // its ranges are the Node's
		}
		m <- prometheus.MustNewConstMetric(poolBlocks, prometheus.GaugeValue, float64(len(p.Ranges)), p.Name, "false")
		m <- prometheus.MustNewConstMetric(poolBlocks, prometheus.GaugeValue, float64(len(p.Fixed)), p.Name, "true")
	}
}
