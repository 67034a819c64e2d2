package kube

import (
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

func sliceItems(l *discoveryv1.EndpointSliceList) []discoveryv1.EndpointSlice { return l.Items }

func hasReadyEndpoint(s *discoveryv1.EndpointSlice) bool {
	for _, e := range s.Endpoints {
		// An unknown state is to be taken as ready: EndpointConditions.Ready.
		if len(e.Addresses) > 0 && (e.Conditions.Ready == nil || *e.Conditions.Ready) {
			return true
		}
	}
	return false
}

func daemonSetItems(l *appsv1.DaemonSetList) []appsv1.DaemonSet { return l.Items }

func daemonSetReady(nodes int) func(*appsv1.DaemonSet) bool {
	return func(d *appsv1.DaemonSet) bool {
		return d.Status.ObservedGeneration >= d.Generation && int(d.Status.NumberReady) >= nodes
	}
}

// PodReady says whether the pod has the condition Ready.
func PodReady(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}
