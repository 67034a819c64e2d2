package controller

import (
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/svcfacts"
	"github.com/fathom-network/fathom/internal/facts/vip"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// ServiceProblem is the reason of events about a part of a Service that is not carried.
const ServiceProblem = "ServiceProblem"

// problems records an event for each problem of a Service: an address that another one has, an external IP that is not
// served. All agents find the same ones, so the controller, of which one leads, records them.
type problems struct {
	model *service.Model
	seen  map[service.Name]string // the resource versions in the model
	told  map[service.Problem]bool
}

func newProblems() *problems {
	return &problems{model: service.NewModel(service.Node{}), seen: map[service.Name]string{}, told: map[service.Problem]bool{}}
}

// find brings the model up to date and returns new problems. If another proxy carries Services, there are none.
func (p *problems) find(view *kube.BalancerView, client *kube.Client) []service.Problem {
	config, err := netconf.Parse(view.Config())
	if err != nil {
		return nil // agents keep the previous configuration, and report that
	}
	if config.ServiceProxy == netconf.ProxyOff {
		clear(p.told)
		return nil
	}
	gone := make(map[service.Name]bool, len(p.seen))
	for name := range p.seen {
		gone[name] = true
	}
	for _, s := range view.Services.All() {
		name := service.Name{Namespace: s.Namespace, Name: s.Name}
		delete(gone, name)
		if version := string(s.UID) + s.ResourceVersion; p.seen[name] != version {
			p.model.SetService(svcfacts.Service(s))
			p.seen[name] = version
		}
	}
	for name := range gone {
		p.model.DeleteService(name)
		delete(p.seen, name)
	}
	for _, s := range view.APIServers.All() {
		p.model.SetSlice(svcfacts.Slice(s))
	}
	objects := vip.Objects{Pools: view.AddressPools.All(), Nodes: view.Nodes.All(), Services: view.ServiceCIDRs.All(), PodPools: view.PodPools.All()}
	p.model.SetExternalIPs(vip.ExternalIPs(config, objects, vip.Read(objects), view.Namespaces.All(), client.ServerAddr()))
	var found []service.Problem
	now := map[service.Problem]bool{}
	for _, problem := range p.model.Problems() {
		if now[problem] = true; !p.told[problem] {
			found = append(found, problem)
		}
	}
	p.told = now
	return found
}

// tellProblems records events for new problems of Services.
func (a *allocator) tellProblems() {
	for _, p := range a.problems.find(a.view, a.Client) {
		a.Log.Warn("problem", "what", p.String())
		if s, found := a.view.Services.Get(p.Service.Namespace, p.Service.Name); found {
			a.record(s, kube.Event{Warning: true, Reason: ServiceProblem, Message: p.Text})
		}
	}
}
