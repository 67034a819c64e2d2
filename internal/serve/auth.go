package serve

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Access says who may read metrics.
type Access string

const (
	// Open is everybody who reaches the port.
	Open Access = "open"
	// Authenticated asks for a token of the cluster whose user may get the path, as kube-rbac-proxy and Kubernetes' own
	// components do, and speaks TLS, or the token could be read on its way.
	Authenticated Access = "authenticated"
)

// Reviewer says who a token is of and whether that user may GET a path (TokenReview, SubjectAccessReview).
type Reviewer interface {
	ReviewToken(ctx context.Context, token, path string) (known, allowed bool, err error)
}

// errBusy says that so many tokens were asked about that this one has to wait.
var errBusy = errors.New("too many tokens are being checked")

const (
	// What is known of a token holds so long, whether it was good or not. A token that was revoked is good for that time.
	verdictHolds = 30 * time.Second
	// verdicts is how many are kept.
	verdicts = 64
	// reviewing bounds a question to the API server.
	reviewing = 5 * time.Second
	// Strangers' tokens cost the API server two requests each: so many are asked about in a second, and at once.
	reviewsPerSecond, reviewsAtOnce = 5, 10
)

// Guard lets requests through whose bearer token a reviewer allows.
func Guard(next http.Handler, r Reviewer) http.Handler {
	return &guard{next: next, reviewer: r, now: time.Now, limit: rate.NewLimiter(reviewsPerSecond, reviewsAtOnce), known: map[[sha256.Size]byte]remembered{}}
}

type guard struct {
	next     http.Handler
	reviewer Reviewer
	now      func() time.Time
	limit    *rate.Limiter

	mu    sync.Mutex
	known map[[sha256.Size]byte]remembered // by the hash of token and path: no token is kept
}

type verdict struct{ known, allowed bool }

type remembered struct {
	verdict
	until time.Time
}

func (g *guard) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	token, bearer := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !bearer || token == "" {
		w.Header().Set("WWW-Authenticate", "Bearer")
		http.Error(w, "a bearer token is needed", http.StatusUnauthorized)
		return
	}
	v, err := g.review(r.Context(), token, r.URL.Path)
	switch {
	case errors.Is(err, errBusy):
		w.Header().Set("Retry-After", "1")
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
	case err != nil:
		http.Error(w, "the API server does not say whose the token is", http.StatusServiceUnavailable)
	case !v.known:
		w.Header().Set("WWW-Authenticate", "Bearer")
		http.Error(w, "the token is not the cluster's", http.StatusUnauthorized)
	case !v.allowed:
		http.Error(w, "the token's user may not get "+r.URL.Path, http.StatusForbidden)
	default:
		g.next.ServeHTTP(w, r)
	}
}

func (g *guard) review(ctx context.Context, token, path string) (v verdict, err error) {
	key := sha256.Sum256([]byte(path + "\x00" + token))
	now := g.now()
	g.mu.Lock()
	k, found := g.known[key]
	g.mu.Unlock()
	if found && now.Before(k.until) {
		return k.verdict, nil
	}
	if !g.limit.Allow() {
		return v, errBusy
	}
	ctx, cancel := context.WithTimeout(ctx, reviewing)
	defer cancel()
	if v.known, v.allowed, err = g.reviewer.ReviewToken(ctx, token, path); err != nil {
		return v, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.known) >= verdicts {
		// Strangers' tokens must not push out the one that Prometheus has: those that were refused go first.
		for _, allowed := range []bool{false, true} {
			for key, k := range g.known {
				if len(g.known) >= verdicts && (k.allowed == allowed || now.After(k.until)) {
					delete(g.known, key)
				}
			}
		}
	}
	g.known[key] = remembered{v, now.Add(verdictHolds)}
	return v, nil
}

// SelfSigned returns a TLS configuration with a certificate that was made for it. It keeps tokens from being read on their
// way; that the server is the right one it does not show, as with a kubelet's.
func SelfSigned(name string) (*tls.Config, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make a key for TLS: %w", err)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, fmt.Errorf("make a certificate for TLS: %w", err)
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(10, 0, 0),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, fmt.Errorf("make a certificate for TLS: %w", err)
	}
	return &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}, nil
}

// ListenMetrics answers Prometheus at an address, as access says.
func ListenMetrics(ctx context.Context, o Options, access Access, r Reviewer) (stop func(), err error) {
	switch access {
	case Open, "":
	case Authenticated:
		if o.TLS, err = SelfSigned("fathom"); err != nil {
			return nil, err
		}
		o.Handler = Guard(o.Handler, r)
	default:
		return nil, fmt.Errorf("metrics access %q: want %s or %s", access, Open, Authenticated)
	}
	return Listen(ctx, o)
}
