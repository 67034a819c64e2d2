package service_test

import (
	"fmt"
	"net/netip"
	"runtime"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/svcfacts"
)

// large returns a cluster of 10,000 Services with 10 endpoints each, on 500 nodes of 3 zones.
func large() ([]*corev1.Service, endpointSlices) {
	var services []*corev1.Service
	var all endpointSlices
	vip, pod := netip.MustParseAddr("10.96.0.0"), netip.MustParseAddr("10.128.0.0")
	for i := range 10_000 {
		vip = vip.Next()
		name := fmt.Sprintf("s%d", i)
		services = append(services, web(named(name, int64(i)), clusterIPs(vip.String())))
		var list []string
		for j := range 10 {
			pod = pod.Next()
			n := i*10 + j
			list = append(list, fmt.Sprintf("%s on=node-%d in=zone-%d zones=zone-%[3]d ready serving pod=web-%d", pod, n%500, n%3, n))
		}
		all = append(all, of(name, slice(name+"-x", "http:8080", list...)))
	}
	return services, all
}

func BenchmarkModelBuild(b *testing.B) {
	services, all := large()
	b.ReportAllocs()
	for b.Loop() {
		m := service.NewModel(service.Node{Name: "node-1", Zone: "zone-1"})
		m.Replace(svcfacts.Services(services), svcfacts.Slices(all))
		if n := len(m.Changes()); n != 10_000 {
			b.Fatalf("%d changes", n)
		}
	}
}

// The memory of a model, without the API's objects.
func BenchmarkModelMemory(b *testing.B) {
	services, all := large()
	var before, after runtime.MemStats
	for b.Loop() {
		runtime.GC()
		runtime.ReadMemStats(&before)
		m := service.NewModel(service.Node{Name: "node-1", Zone: "zone-1"})
		m.Replace(svcfacts.Services(services), svcfacts.Slices(all))
		m.Changes()
		runtime.GC()
		runtime.ReadMemStats(&after)
		runtime.KeepAlive(m)
	}
	runtime.KeepAlive(services)
	runtime.KeepAlive(all)
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/(1<<20), "MiB/model")
}

func BenchmarkModelChange(b *testing.B) {
	services, all := large()
	m := service.NewModel(service.Node{Name: "node-1", Zone: "zone-1"})
	m.Replace(svcfacts.Services(services), svcfacts.Slices(all))
	m.Changes()
	less := all[5000].DeepCopy()
	less.Endpoints = less.Endpoints[:5]
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		m.SetSlice(svcfacts.Slice([]*discoveryv1.EndpointSlice{less, all[5000]}[i%2]))
		if n := len(m.Changes()); n != 1 {
			b.Fatalf("%d changes", n)
		}
	}
}

func BenchmarkModelFrontends(b *testing.B) {
	services, all := large()
	m := service.NewModel(service.Node{Name: "node-1", Zone: "zone-1"})
	m.Replace(svcfacts.Services(services), svcfacts.Slices(all))
	b.ReportAllocs()
	for b.Loop() {
		m.Frontends()
	}
}
