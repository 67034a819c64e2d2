package kube

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/api/v1alpha1"
)

// TestReference: an object that was listed does not state its kind, and its reference does.
func TestReference(t *testing.T) {
	m := metav1.ObjectMeta{Namespace: "shop", Name: "web", UID: "1-2", ResourceVersion: "7"}
	for want, o := range map[string]Object{
		"v1 Service":                          &corev1.Service{ObjectMeta: m},
		"fathom.network/v1alpha1 IPPool":      &v1alpha1.IPPool{ObjectMeta: m},
		"fathom.network/v1alpha1 IPBlock":     &v1alpha1.IPBlock{ObjectMeta: m},
		"fathom.network/v1alpha1 AddressPool": &v1alpha1.AddressPool{ObjectMeta: m},
		"fathom.network/v1alpha1 BGPPeer":     &v1alpha1.BGPPeer{ObjectMeta: m},
	} {
		r := Reference(o)
		if got := r.APIVersion + " " + r.Kind; got != want || r.Namespace != "shop" || r.Name != "web" || r.UID != "1-2" || r.ResourceVersion != "7" {
			t.Errorf("got %+v, want %s shop/web with UID and version", r, want)
		}
	}
}
